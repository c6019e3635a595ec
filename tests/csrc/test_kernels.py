"""Builds the C++ tests of the kernels, runs them here and under emulation, and checks what compilers make of kernels.

Without a cross compiler and QEMU, or without LLVM's tools, the tests that need them are skipped with the reason;
``.ci/run`` installs both and fails on any skip. For longer runs see ``build.py``.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "torch_ext" / "csrc"

# CPUs that QEMU shows: everything, with SVE vectors of 512 bits; the same with 256, as on Graviton3; Graviton2's core,
# without bf16; an older one, without dot products either.
MAX, SVE256 = "max", "max,sve256=on"
CPUS = (MAX, SVE256, "neoverse-n1", "cortex-a72")
CPUS_WITH_BF16 = {MAX, SVE256}
# Variants of build.py whose objects are looked at.
VARIANTS_OF = {"gcc": "aarch64", "clang": "aarch64-clang"}


def _load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


build = _load("csrc_tests_build", ROOT / "tests" / "csrc" / "build.py")
mca = _load("csrc_tests_mca", ROOT / "benchmarks" / "mca.py")


@functools.cache
def program(variant: str) -> Path:
    """The test program of a variant; the test is skipped if its tools are missing."""
    missing = build.missing_tools(variant)
    if missing:
        pytest.skip(f"no {' and no '.join(missing)}: install g++-aarch64-linux-gnu and qemu-user-static")
    return build.build(variant)


def run(variant: str, *args: str, cpu: str | None = None, isa: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in {"TORCH_EXT_ISA", "QEMU_CPU"}}
    if isa is not None:
        environment["TORCH_EXT_ISA"] = isa
    command = [*build.command(variant, program(variant), cpu), *args]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def expect_passed(done: subprocess.CompletedProcess[str], seed: int) -> None:
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert f"seed {seed}," in done.stdout
    assert " 0 failed, 0 paths missed" in done.stdout


def not_on_this_cpu(done: subprocess.CompletedProcess[str]) -> list[str]:
    prefix = "not on this CPU: "
    return [line.removeprefix(prefix) for line in done.stdout.splitlines() if line.startswith(prefix)]


# ---- correctness ----------------------------------------------------------------------------------------------------


def test_flags_are_those_of_setup_py() -> None:
    setup = (ROOT / "setup.py").read_text()
    assert [flag for flag in build.SHIPPED_FLAGS if f'"{flag}"' not in setup] == []
    assert mca.FLAGS == build.SHIPPED_FLAGS


def test_every_kernel_source_is_compiled() -> None:
    sources = {path.relative_to(CSRC).as_posix() for path in build.kernel_sources()}
    assert {"gemm.cpp", "attention.cpp", "dispatch.cpp", "kernels/neon_bf16/gemm_bfmmla.cpp"} <= sources
    assert sources == {
        path.relative_to(CSRC).as_posix()
        for path in CSRC.rglob("*.cpp")
        if path.parent.name not in {"ops", "compat", "python"} and path.name != "registration.cpp"
    }


def test_objects_of_the_extension_are_linked_until_something_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    csrc = tmp_path / "torch_ext" / "csrc"
    platform = f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    objects = tmp_path / "build" / platform / "torch_ext" / "csrc"
    files = [tmp_path / "setup.py", *(csrc / name for name in ("a.cpp", "kernels/b.cpp", "ops/c.cpp", "kernels/d.h"))]
    made = [objects / name for name in ("a.o", "kernels/b.o", "ops/c.o")]

    def at(time_s: int, *paths: Path) -> None:
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            os.utime(path, (time_s, time_s))

    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(build, "CSRC", csrc)
    at(1000, *files)
    assert build.objects_of_extension() == {}
    at(2000, *made)
    both = {csrc / "a.cpp": made[0], csrc / "kernels" / "b.cpp": made[1]}
    assert build.objects_of_extension() == both
    at(3000, csrc / "a.cpp")
    assert build.objects_of_extension() == {csrc / "kernels" / "b.cpp": made[1]}
    for path in (csrc / "kernels" / "d.h", tmp_path / "setup.py"):
        at(3000, path)
        assert build.objects_of_extension() == {}
        at(1000, path)
    at(4000, *made)
    assert build.objects_of_extension() == both


@pytest.mark.parametrize("options", [("--quick",), pytest.param((), marks=pytest.mark.long, id="all")])
def test_kernels_on_this_machine(options: tuple[str, ...], seed: int) -> None:
    """Every path and every kind of shape; all of them with more sizes and random shapes."""
    expect_passed(run("native", *options, "--seed", str(seed)), seed)


@pytest.mark.emulator
@pytest.mark.parametrize("cpu", CPUS)
def test_kernels_under_emulation(cpu: str, seed: int) -> None:
    done = run("aarch64", "--quick", "--seed", str(seed), cpu=cpu)
    expect_passed(done, seed)
    left_out = not_on_this_cpu(done)
    if cpu == SVE256:
        assert left_out == []
    elif cpu == MAX:
        assert left_out == ["bf16p24x4 sve256_bfmmla"]
    else:
        assert left_out
        assert all(re.search("bf16_fmla|bfmmla|smmla|sdot", name) for name in left_out)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_sanitizers_find_nothing(seed: int) -> None:
    """`make nightly` runs them on all kinds of shapes, and on 10,000 random batches; that of threads, too."""
    done = run("sanitize", "--quick", "--seed", str(seed))
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert " 0 failed" in done.stdout


def test_a_run_without_tests_fails() -> None:
    assert run("native", "--filter", "no such test").returncode == 1
    assert run("native", "--no-such-option").returncode == 2


@pytest.mark.long
def test_a_path_that_no_test_runs_fails() -> None:
    done = run("native", "--quick", "--skip", "attention")
    assert done.returncode == 1
    assert " 0 failed" in done.stdout
    missed = [line for line in done.stdout.splitlines() if line.startswith("FAIL this CPU has the path")]
    assert missed
    assert all("attention" in line for line in missed)


# ---- dispatch -------------------------------------------------------------------------------------------------------


def report(variant: str, cpu: str | None, isa: str | None = None) -> dict[str, object]:
    done = run(variant, "--report", cpu=cpu, isa=isa)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


MACHINES = [pytest.param("native", None, id="native")] + [
    pytest.param("aarch64", cpu, id=cpu, marks=pytest.mark.emulator) for cpu in CPUS
]


@pytest.mark.parametrize(("variant", "cpu"), MACHINES)
def test_the_first_supported_candidate_is_chosen(variant: str, cpu: str | None) -> None:
    chosen = report(variant, cpu)
    supported = [c["name"] for c in chosen["candidates"] if c["supported"]]
    assert chosen["forced"] is False
    assert chosen["isa"] == supported[0]
    assert report(variant, cpu, isa="") == chosen  # set to nothing is not set
    if variant == "aarch64":
        assert chosen["isa"] == {MAX: "neon_i8mm", SVE256: "sve_bf16", "neoverse-n1": "neon_dotprod"}.get(cpu, "neon")
        assert all(("bfmmla" in k) == (cpu in CPUS_WITH_BF16) for k in chosen["linear_kernels"])


@pytest.mark.parametrize(("variant", "cpu"), MACHINES)
def test_every_candidate_can_be_forced_or_is_refused(variant: str, cpu: str | None) -> None:
    for candidate in report(variant, cpu)["candidates"]:
        if candidate["supported"]:
            forced = report(variant, cpu, isa=candidate["name"])
            assert (forced["isa"], forced["forced"]) == (candidate["name"], True)
        else:
            done = run(variant, "--report", cpu=cpu, isa=candidate["name"])
            assert done.returncode == 1
            assert f"TORCH_EXT_ISA={candidate['name']} needs a CPU with" in done.stderr
            assert any(feature in done.stderr for feature in candidate["requires"])


@pytest.mark.emulator
@pytest.mark.parametrize("cpu", ["neoverse-n1", "cortex-a72"])
def test_bf16_kernels_are_refused_without_bf16(cpu: str) -> None:
    done = run("aarch64", "--report", cpu=cpu, isa="neon_bf16")
    assert done.returncode == 1
    assert re.search("needs a CPU with (asimddp, )?bf16,", done.stderr)


# Vectors of Neoverse N2 and V2 have 128 bits. A kernel for 256 bits would make wrong products at any other length.
@pytest.mark.emulator
@pytest.mark.parametrize(
    ("properties", "bits"),
    [
        ("sve=off", 0),
        ("sve128=on,sve256=off", 128),
        ("sve256=on", 256),
        ("sve-default-vector-length=32", 256),  # the CPU has longer ones, the system gives these
        ("sve384=on", 384),
        ("sve512=on", 512),
        ("sve-max-vq=16,sve-default-vector-length=256", 2048),
    ],
)
def test_the_sve_kernel_needs_vectors_of_its_length(properties: str, bits: int) -> None:
    cpu = f"max,{properties}"
    chosen = report("aarch64", cpu)
    assert ("sve" in chosen["cpu_features"]) == (bits > 0)
    assert ("sve256" in chosen["cpu_features"]) == (bits == 256)
    assert chosen["isa"] == ("sve_bf16" if bits == 256 else "neon_i8mm")
    assert all(("x24_sve256_bfmmla" in k) == (bits == 256) for k in chosen["linear_kernels"])
    assert chosen["attention_kernels"] == chosen["linear_kernels"]
    if bits != 256:
        done = run("aarch64", "--report", cpu=cpu, isa="sve_bf16")
        assert done.returncode == 1
        assert re.search(r"TORCH_EXT_ISA=sve_bf16 needs a CPU with (sve, svebf16, )?sve256, which", done.stderr)


@pytest.mark.parametrize("name", ["sve9", "Portable", "neon_bf16 ", "1"])
def test_an_unknown_isa_is_refused(name: str) -> None:
    done = run("native", "--report", isa=name)
    assert done.returncode == 1
    assert f"TORCH_EXT_ISA={name} is unknown on" in done.stderr
    assert "portable" in done.stderr  # what there is


# ---- what compilers make of the kernels -----------------------------------------------------------------------------


@functools.cache
def loops(compiler: str) -> tuple[mca.Loop, ...]:
    compilers = mca.find_compilers()
    if compiler not in compilers:
        pytest.skip(f"no {compiler} for aarch64: install g++-aarch64-linux-gnu and clang-19")
    # gcc's objects are those of the tests under emulation; both are compiled as they are shipped.
    objects = build.compile_sources(VARIANTS_OF[compiler], [CSRC / source for source in mca.SOURCES])
    return tuple(mca.loops_of(map(mca.disassemble, objects)))


@pytest.mark.emulator
@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_the_loop_of_every_kernel_is_found(compiler: str) -> None:
    kernels = run("aarch64", "--kernels").stdout.split()
    # mca.py leaves out what is compiled for every CPU: there is nothing to gain from a model of it.
    expected = {name for name in kernels if not name.endswith("_portable") and "_qs8cxp12x1_" not in name}
    assert len(expected) >= 20
    assert {loop.kernel for loop in loops(compiler)} == expected


@pytest.mark.emulator
@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_no_inner_loop_spills(compiler: str) -> None:
    spills = {loop.kernel: loop.spills() for loop in loops(compiler)}
    assert {kernel: lines for kernel, lines in spills.items() if lines} == {}


@pytest.mark.emulator
@pytest.mark.parametrize("compiler", ["gcc", "clang"])
@pytest.mark.parametrize("cpu", ["neoverse-n2", "neoverse-v1", "neoverse-v2"])
def test_the_main_kernel_reaches_the_peak_of_the_model(compiler: str, cpu: str) -> None:
    tool = mca.find_mca()
    if tool is None:
        pytest.skip(f"no llvm-mca of LLVM {mca.OLDEST_LLVM} or newer: install llvm-19")
    (loop,) = [loop for loop in loops(compiler) if loop.kernel == "gemm_f32_bf16_bf16p12x4_8x12_neon_bfmmla"]
    assert loop.work == 24 * loop.steps
    share = mca.share_of_peak(loop, cpu, tool)
    assert share is not None
    assert 0.97 <= share <= 1.0 + 1e-9


@pytest.mark.emulator
@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_the_sve_kernels_are_preferred_where_the_model_says_so(compiler: str) -> None:
    """At no number of rows slower than NEON's on Neoverse V1, at some faster; else the order in dispatch is wrong."""
    tool = mca.find_mca()
    if tool is None:
        pytest.skip(f"no llvm-mca of LLVM {mca.OLDEST_LLVM} or newer: install llvm-19")
    by_name = {loop.kernel: loop for loop in loops(compiler)}
    cycles = {}
    for rows in (2, 4, 6, 8):
        neon = by_name[f"gemm_f32_bf16_bf16p12x4_{rows}x12_neon_bfmmla"]
        sve = by_name[f"gemm_f32_bf16_bf16p24x4_{rows}x24_sve256_bfmmla"]
        assert sve.work == 3 * rows * sve.steps
        assert len(sve.body) / sve.products < len(neon.body) / neon.products
        cycles[rows] = [mca.cycles(loop, "neoverse-v1", tool) / loop.products for loop in (sve, neon)]
        share = mca.share_of_peak(sve, "neoverse-v1", tool)
        assert share is not None
        assert (0.84 if rows == 2 else 0.97) <= share <= 1.0 + 1e-9
        assert mca.share_of_peak(sve, "neoverse-n2", tool) is None
    assert all(sve <= neon * 1.01 for sve, neon in cycles.values())
    assert any(sve <= neon * 0.9 for sve, neon in cycles.values())


LISTING = """
0000000000000000 <torch_ext::(anonymous namespace)::gemm_f32_bf16_bf16p12x4_2x12_neon_bfmmla(unsigned long)>:
   0:\tldr\tq9, [sp, #16]
   4:\tldr\tq0, [x1], #16
   8:\tbfmmla\tv1.4s, v0.8h, v9.8h
   c:\tstr\tq1, [sp, #32]
  10:\tldp\tq9, q8, [sp, #16]
  14:\tsubs\tx0, x0, #0x1
  18:\tb.ne\t4 <torch_ext::kernel+0x4>  // b.any
  1c:\tstr\tq1, [x3]
  20:\tret
"""


def test_spills_and_loops_are_told_apart() -> None:
    ((name, body),) = mca.functions(LISTING).items()
    loop = mca.inner_loop(mca.kernel_name(name), body)
    assert [i.address for i in loop.body] == [0x4, 0x8, 0xC, 0x10, 0x14, 0x18]
    assert loop.spills() == ["str q1, [sp, #32]", "ldp q9, q8, [sp, #16]"]
    assert loop.work == 1
    assert loop.loads == 3  # q0, and the two of a spill
    assert loop.assembly().startswith("loop:\nldr q0, [x1], #16\n")
    assert loop.assembly().endswith("b.ne loop\n")


@pytest.mark.parametrize(
    ("text", "vectors"),
    [
        ("ld1 {v4.16b-v7.16b}, [x2], #64", 4),
        ("ld1 {v4.16b, v5.16b}, [x2], #32", 2),
        ("ldp q4, q5, [x2, #32]", 2),
        ("ld1rqh {z0.h}, p0/z, [x1, #-128]", 1),
        ("ldr z4, [x2, #6, mul vl]", 1),
        ("ldr x4, [x2]", 0),
        ("bfmmla z8.s, z0.h, z4.h", 0),
    ],
)
def test_vectors_that_a_loop_loads_are_counted(text: str, vectors: int) -> None:
    assert mca.Loop("gemm_2x24_sve256_bfmmla", "sve256_bfmmla", (mca.Instruction(0, text),)).loads == vectors
