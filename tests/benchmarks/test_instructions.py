"""`make bench-model`: reading counts and blocks, modelling cycles, and what is promised. Nothing here is emulated."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from benchmarks import blocks, instructions, instructions_report, mca
from benchmarks.instructions_report import OURS, OURS_INT8, WORKS, Found

COUNTS = """\
run total=93530 bfmmla=0 load=25240 other=1
region0 calls=1 total=61485 bfmmla=40000 load=20480 other=1005
region2 calls=1 total=3 bfmmla=1 load=1 other=1
region3 calls=2 total=9 bfmmla=9 load=0 other=0
"""


def test_read_counts_takes_regions_that_ran_once() -> None:
    found = instructions.read_counts(COUNTS)
    assert found.keys() == {0, 2}
    assert found[0] == {"total": 61485, "bfmmla": 40000, "load": 20480, "other": 1005}


def test_every_run_has_one_engine_and_all_works() -> None:
    plan = instructions.cases_of([OURS, *instructions_report.PEERS])
    assert all(len(cases) == len(WORKS) for cases in plan)
    assert all(len({case["engine"] for case in cases}) == 1 for cases in plan)
    pairs = {(case["engine"], case["name"]) for cases in plan for case in cases}
    assert len(pairs) == len(WORKS) * (1 + len(instructions_report.PEERS))


def found(engine: str, millions: dict[str, float], bfmmla: float = 0.7) -> list[Found]:
    return [
        Found(work, engine, {"total": int(total * 1e6), "bfmmla": int(total * 1e6 * bfmmla), "other": 1})
        for work, total in millions.items()
    ]


BF16 = {work: limit for (work, engine), limit in instructions_report.BARS.items() if engine == OURS}
BF16 |= {"linear 128x768x3072": 27, "BERT-base, 2 layers, 16 tokens": 20, "BERT-base, 2 layers, 128 tokens": 150}
INT8 = {work: limit for (work, engine), limit in instructions_report.BARS.items() if engine == OURS_INT8}
INT8 |= {"BERT-base, 2 layers, 16 tokens": 10, "BERT-base, 2 layers, 128 tokens": 90}
PEERS = [
    *found("PyTorch bf16", {work: 3 * total for work, total in BF16.items()}),
    *found("ONNX Runtime bf16", {work: 2 * total for work, total in BF16.items()}),
    *found("ONNX Runtime int8", {work: 2 * total for work, total in INT8.items()}),
]


def test_bars_are_kept() -> None:
    all_found = [*found(OURS, BF16), *found(OURS_INT8, INT8), *PEERS]
    bars = instructions_report.bars(all_found, peers=True)
    assert len(bars) == len(instructions_report.BARS) + len(instructions_report.RATIOS) + 1
    assert all(bar.passed for bar in bars), [bar.line() for bar in bars]


@pytest.mark.parametrize("work", BF16)
def test_each_bar_can_be_missed(work: str) -> None:
    worse = BF16 | {work: BF16[work] * 1.2}
    all_found = [*found(OURS, worse), *found(OURS_INT8, INT8), *PEERS]
    missed = [bar.what for bar in instructions_report.bars(all_found, peers=True) if not bar.passed]
    if work == "linear 128x768x3072":  # has no bar of its own in bf16, only for its share of BFMMLA
        assert missed == []
    else:
        assert len(missed) == 1
        assert missed[0].endswith(work)


def test_share_of_matrix_instructions() -> None:
    missed = [bar.line() for bar in instructions_report.bars(found(OURS, BF16, 0.5), peers=False) if not bar.passed]
    assert len(missed) == 1
    assert missed[0].startswith("FAIL  share of BFMMLA")


def test_int8_bars_only_where_there_is_int8() -> None:
    assert not any(OURS_INT8 in bar.what for bar in instructions_report.bars(found(OURS, BF16), peers=False))


def test_work_that_was_not_counted_misses_its_bar() -> None:
    missed = [bar for bar in instructions_report.bars([*found(OURS, BF16)][1:], peers=False) if not bar.passed]
    assert [bar.value for bar in missed] == [None]


def test_tables_and_plot_have_gaps_where_nothing_was_counted() -> None:
    all_found = [*found(OURS, BF16), *found("ONNX Runtime int8", INT8)]
    for item in all_found:
        item.cycles = dict.fromkeys(blocks.CPUS, item.counts["total"] / 2)
    data = {"heading": "h", "covered": 0.97, "cpu": "neoverse-n2", "left_out": {"PyTorch bf16": "why"}, "bars": []}
    text = instructions_report.text_of(data, all_found)
    row = next(line for line in text.splitlines() if line.startswith("| linear 1x768x768 "))
    assert [cell.strip() for cell in row.split("|")[2:-1]] == [f"{BF16['linear 1x768x768']:.2f}", ""]
    assert "left out: PyTorch bf16: why" in text
    for cpu in blocks.CPUS:
        assert f"### {cpu}" in text
    panel = instructions_report.panels_of(all_found)[0]
    values = dict(zip(panel.labels, panel.series["ONNX Runtime int8"], strict=True))
    assert values["linear 1x768x768"] is None
    work = "MiniLM-L6, 16 tokens"
    assert values[work] == pytest.approx(INT8[work] / BF16[work])


def test_python_of_a_root(tmp_path: Path) -> None:
    assert instructions.find_python(tmp_path) is None
    folder = tmp_path / "usr" / "bin"
    folder.mkdir(parents=True)
    for name in ("python3", "python3.9", "python3.11", "python3.11-config"):
        (folder / name).touch()
    found = instructions.find_python(tmp_path)
    assert found is not None
    assert found.name == "python3.11"


# fmla v0.4s, v2.4s, v1.4s: one sum that waits for itself; add x0, x0, #16; b.ne back.
CHAIN = ("4e21cc40", "91004000", "54ffffc1")
UNKNOWN = ("00000000",)


def test_read_blocks(tmp_path: Path) -> None:
    path = tmp_path / "blocks.txt"
    path.write_text(f"0 5 {' '.join(CHAIN)}\n1 2 {CHAIN[0]}\n0 3 {' '.join(CHAIN)}\n")
    assert blocks.read_blocks(path) == {0: Counter({CHAIN: 8}), 1: Counter({(CHAIN[0],): 2})}


def test_hottest_blocks() -> None:
    executed = {("a",) * 10: 90, ("b",): 90, ("c",) * 5: 2}
    assert blocks.hottest(executed, 0.9) == [("a",) * 10]
    assert blocks.hottest(executed, 0.95) == [("a",) * 10, ("b",)]
    assert set(blocks.hottest(executed, 1.0)) == set(executed)


def test_cycles_of_a_chain() -> None:
    tool = mca.find_mca()
    if tool is None:
        pytest.skip(f"no llvm-mca of LLVM {mca.OLDEST_LLVM} or newer")
    model = blocks.Model(tool, tool.replace("llvm-mca", "llvm-mc"))
    # An FMLA that adds to its own result takes 4 cycles on N2, 2 on V2, which forwards sums.
    assert model.cycles(Counter({CHAIN: 1000}), "neoverse-n2") == pytest.approx(4000, rel=0.05)
    assert model.cycles(Counter({CHAIN: 1000}), "neoverse-v2") == pytest.approx(2000, rel=0.05)
    # What the disassembler does not know costs something, and stops nothing.
    assert model.cycles(Counter({CHAIN: 1000, UNKNOWN: 2000}), "neoverse-n2") > 4000
    with pytest.raises(RuntimeError, match="no blocks"):
        model.cycles(Counter(), "neoverse-n2")


def test_target_names_every_engine() -> None:
    source = (Path(instructions.__file__).with_name("instructions_target.py")).read_text()
    for engine in (OURS, OURS_INT8, *instructions_report.PEERS):
        kind = engine.rsplit(" ", 1)[0]
        assert kind in ("torch_ext", "PyTorch", "ONNX Runtime")
    assert re.search(r'kind == "torch_ext"', source)


# What the assembler of GNU binutils makes of an instruction of each form.
WORDS = {
    "bfmmla": (0x6E42EC20, 0x6462E420),  # NEON, SVE
    "bfdot": (0x6E42FC25, 0x4F62F025),  # vector, by element
    "bfmlal": (0x4FF2F026,),
    "i8mm": (0x4E82A423, 0x4E82AC23),  # SMMLA, USMMLA
    "i8dot": (0x4E829424, 0x6F82E824),
    "fmla": (0x4FA21027, 0x65A20020),
    "load": (0xAD402408, 0xF9400420, 0x9C000020, 0xF9800000),  # LDP, LDR, LDR of a literal, PRFM
    "store": (0xE540E000, 0x3D800008, 0xA9BF07E0),  # SVE's ST1W, STR, STP
    "simd_other": (0x4EA28420,),
    "sve_other": (0x05A03800,),
    "branch": (0xB4000000, 0xD65F03C0, 0xD5032F3F),  # CBZ, RET, a marker (not counted)
    "other": (0x8B020020,),
}


@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not there")
def test_classes_of_instructions(tmp_path: Path) -> None:
    """The plugin's source with a main function, in place of the emulator, that asks for the class of each word."""
    source = Path(instructions.__file__).with_name("classes.c")
    main = (
        f'#include "{source}"\n#include <stdlib.h>\n'
        "int main(int n, char** words) {"
        " for (int i = 1; i < n; ++i) puts(names[class_of((uint32_t)strtoul(words[i], 0, 16))]); return 0; }\n"
    )
    (tmp_path / "main.c").write_text(main)
    # What calls the emulator's functions is not linked.
    flags = ["-O1", "-Wall", "-Wextra", "-Werror", "-ffunction-sections", "-fdata-sections", "-Wl,--gc-sections"]
    subprocess.run(["gcc", *flags, "-o", str(tmp_path / "main"), str(tmp_path / "main.c")], check=True)
    expected = [(name, f"{word:x}") for name, words in WORDS.items() for word in words]
    run = subprocess.run(
        [str(tmp_path / "main"), *(word for _, word in expected)], check=True, capture_output=True, text=True
    )
    assert list(zip(run.stdout.split(), (word for _, word in expected), strict=True)) == expected


@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not there")
@pytest.mark.parametrize("plugin", ["blocks", "classes"])
def test_plugins_agree_on_the_emulators_interface(plugin: str, tmp_path: Path) -> None:
    """Each takes the declarations from the header, has none of its own, and exports what the emulator looks for."""
    source = Path(instructions.__file__).with_name(f"{plugin}.c")
    assert not re.search(r"^\w.*[ *]qemu_plugin_(?!install)\w+\(", source.read_text(), re.MULTILINE)
    target = tmp_path / "plugin.so"
    flags = ["-O1", "-Wall", "-Wextra", "-Werror", "-fvisibility=hidden", "-shared", "-fPIC"]
    subprocess.run(["gcc", *flags, "-o", str(target), str(source)], check=True)
    symbols = subprocess.run(
        ["nm", "-D", "--defined-only", str(target)], check=True, capture_output=True, text=True
    ).stdout
    assert {line.split()[-1] for line in symbols.splitlines()} >= {"qemu_plugin_version", "qemu_plugin_install"}
