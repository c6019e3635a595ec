"""Programs of torch.export: what models that torch_ext's encoder does not run are served by."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from array import array
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))

from conftest import save_tokenizer

from deploy.bundle import TASKS, BundleError, load_manifest
from deploy.engines.batch import PairIds
from deploy.engines.open import load_engine, open_engine
from deploy.engines.program import Layout, shaped
from deploy.engines.program_file import LAYOUT_FILE, check_archive
from deploy.export.cli import main
from deploy.export.errors import NotSupportedError
from deploy.export.write_program import write_program

ROOT = Path(__file__).resolve().parents[2]
NAME = "torch-export-bf16"
QUICK = ["--max-texts", "8", "--speed-seconds", "0", "--quiet", "--variants", NAME]
ModelMaker = Callable[..., Path]
FIRST = ("feature-extraction", "question-answering")


@pytest.fixture(scope="module")
def program(tiny_model: ModelMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with a program alone; not to be changed."""
    target = tmp_path_factory.mktemp("program") / "out"
    assert main([str(tiny_model("bert", "text-classification", num_labels=3)), "-o", str(target), *QUICK]) == 0
    return target


@pytest.mark.parametrize("task", [pytest.param(t, marks=() if t in FIRST else pytest.mark.long) for t in TASKS])
def test_every_task(task: str, tiny_model: ModelMaker, tmp_path: Path) -> None:
    """Export compares the answers with those of transformers, and refuses what misses the bounds of bf16."""
    assert main([str(tiny_model("bert", task)), "-o", str(tmp_path / "out"), *QUICK]) == 0
    manifest = load_manifest(tmp_path / "out", verify=True)
    variant = manifest.variant(NAME)
    assert (variant.engine, variant.dtype, variant.file) == ("torch", "bf16", "program_bf16.pt2")
    assert variant.accuracy is not None
    assert variant.accuracy.mean > 0.98
    assert variant.kernels is not None
    assert variant.kernels.startswith("torch-")


def test_texts_of_all_lengths_and_pairs(program: Path, tiny_model: ModelMaker) -> None:
    import transformers

    folder = tiny_model("bert", "text-classification", num_labels=3)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    engine, _ = load_engine(load_manifest(program), load_manifest(program).variant(NAME), 1)
    rng = np.random.default_rng(0)
    texts = [array("q", rng.integers(5, 100, size).tolist()) for size in (1, 66, 2, 3, 31, 4, 17, 8)]
    pair = PairIds(texts[4], array("q", [0] * 15 + [1] * 16))
    items = [*texts, pair]
    answers = engine.run(items, [engine.task.exact] * len(items))
    for item, answer in zip(items, answers, strict=True):
        ids = item.ids if isinstance(item, PairIds) else item
        types = item.types if isinstance(item, PairIds) else [0] * len(ids)
        with torch.inference_mode():
            right = model(torch.tensor([list(ids)]), token_type_ids=torch.tensor([list(types)])).logits[0].numpy()
        np.testing.assert_allclose(np.asarray(answer), right, atol=0.03 * np.abs(right).max())
    # A text is not changed by those beside it.
    alone = engine.run(items[3:4], [engine.task.exact])[0]
    np.testing.assert_allclose(np.asarray(answers[3]), np.asarray(alone), atol=0.02 * np.abs(np.asarray(alone)).max())


def test_a_decoder(tmp_path: Path) -> None:
    """Transformers 4 makes its masks by vmap, and its rotary positions without autocast; torch saves neither."""
    import transformers

    folder = tmp_path / "model"
    folder.mkdir()
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.MistralConfig(
        vocab_size=save_tokenizer(folder, "bert"),
        intermediate_size=64,
        max_position_embeddings=66,
        initializer_range=0.15,
        sliding_window=6,
        pad_token_id=0,
        **sizes,
    )
    torch.manual_seed(0)
    model = transformers.MistralModel(config).eval()
    model.save_pretrained(folder)
    before = torch.autocast
    assert main([str(folder), "-o", str(tmp_path / "out"), *QUICK, "--pooling", "lasttoken"]) == 0
    assert torch.autocast is before
    manifest = load_manifest(tmp_path / "out")
    engine, _ = load_engine(manifest, manifest.variant(NAME), 1)
    rng = np.random.default_rng(0)
    texts = [array("q", rng.integers(5, 100, size).tolist()) for size in (3, 40, 9)]
    for text, found in zip(texts, engine.run(texts, [engine.task.exact] * 3), strict=True):
        with torch.inference_mode():
            right = model(torch.tensor([list(text)])).last_hidden_state[0, -1].numpy()
        assert np.asarray(found) @ right / np.linalg.norm(found) / np.linalg.norm(right) > 0.9995


def test_texts_one_by_one(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the layout of some programs wants it."""
    manifest = load_manifest(program)
    engine = open_engine(manifest, manifest.variant(NAME), 1)
    texts = [array("q", range(5, 5 + size)) for size in (7, 3, 3, 12)]
    expected = engine.run(texts, [engine.task.exact] * 4)
    monkeypatch.setattr("deploy.engines.program.Layout.from_json", lambda text: Layout(single=True))
    engine: Any = open_engine(manifest, manifest.variant(NAME), 1)
    shapes: list[tuple[int, ...]] = []
    forward = engine._forward
    monkeypatch.setattr(engine, "_forward", lambda *arrays: shapes.append(arrays[0].shape) or forward(*arrays))
    found = engine.run(texts, [engine.task.exact] * 4)
    assert shapes == [(1, 12), (1, 7), (1, 3), (1, 3)]
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), atol=0.02 * np.abs(np.asarray(expected)).max())


def test_server_needs_no_transformers(program: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from deploy.bundle import load_manifest\n"
        "from deploy.engines.open import load_engine\n"
        "before = 'torch' in sys.modules; manifest = load_manifest(Path(sys.argv[1]))\n"
        f"engine, isa = load_engine(manifest, manifest.variant({NAME!r}), 1)\n"
        "print(before, isa.startswith('torch-'), {'transformers', 'onnxruntime', 'optimum'} & set(sys.modules))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(program)], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert found.stdout == "False True set()\n", found.stderr


def test_without_torch(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "deploy.engines.program")
    monkeypatch.setitem(sys.modules, "torch", None)
    manifest = load_manifest(program)
    with pytest.raises(BundleError, match=r"needs torch, which cannot be imported .*pip install 'torch>=2\.10' numpy"):
        open_engine(manifest, manifest.variant(NAME), 1)


def test_weights_are_in_bf16_and_paths_of_this_machine_are_not_there(program: Path) -> None:
    manifest = load_manifest(program)
    with zipfile.ZipFile(program / manifest.variant(NAME).file) as archive:
        (settings,) = [name for name in archive.namelist() if name.endswith("model_weights_config.json")]
        weights = json.loads(archive.read(settings))["config"]
        graph = archive.read(next(name for name in archive.namelist() if "/models/" in name)).decode()
    kinds = {name: item["tensor_meta"]["dtype"] for name, item in weights.items()}
    bf16 = kinds["model.bert.embeddings.word_embeddings.weight"]
    assert kinds["model.bert.encoder.layer.0.output.dense.weight"] == bf16
    assert kinds["model.bert.encoder.layer.0.output.LayerNorm.weight"] != bf16
    assert str(ROOT) not in graph
    assert "site-packages" not in graph


# Files that are none of an export's.


def rewritten(source: Path, target: Path, change: Callable[[str, bytes], bytes]) -> Path:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for entry in old.infolist():
            new.writestr(entry, change(entry.filename, old.read(entry)))
    return target


@pytest.mark.parametrize(
    ("part", "old", "new", "said"),
    [
        ("_weights_config.json", '"use_pickle": false', '"use_pickle": true', "a pickle"),
        ("/models/", "torch.ops.aten.linear.default", "torch.hub.load", "a call of 'torch.hub.load'"),
        ("/models/", "torch.ops.aten.linear.default", "_operator.attrgetter", "a call of"),
        ("/models/", '"expr_str": "', '"expr_str": "__import__(chr(39)) + ', "the expression"),
        ("/models/", '"guards_code": [', '"guards_code": ["open(1)", ', "the expression"),
    ],
)
def test_files_with_more_than_a_program(
    part: str, old: str, new: str, said: str, program: Path, tmp_path: Path
) -> None:
    def change(name: str, content: bytes) -> bytes:
        if part not in name:
            return content
        assert old.encode() in content
        return content.replace(old.encode(), new.encode(), 1)

    path = rewritten(program / "program_bf16.pt2", tmp_path / "x.pt2", change)
    with pytest.raises(BundleError, match=f"holds {said}") as caught:
        check_archive(path)
    assert "nothing of it was run" in str(caught.value)


def test_files_with_inputs_in_a_pickle(program: Path, tmp_path: Path) -> None:
    path = rewritten(
        program / "program_bf16.pt2", tmp_path / "x.pt2", lambda name, old: b"cos" if "sample_inputs" in name else old
    )
    with pytest.raises(BundleError, match="inputs in a pickle"):
        check_archive(path)


def test_files_that_are_no_archive(tmp_path: Path) -> None:
    (tmp_path / "x.pt2").write_bytes(b"no archive")
    with pytest.raises(BundleError, match="expected a program"):
        check_archive(tmp_path / "x.pt2")
    with zipfile.ZipFile(tmp_path / "y.pt2", "w"):
        pass
    with pytest.raises(BundleError, match=LAYOUT_FILE):
        check_archive(tmp_path / "y.pt2")


# Which batches a program takes.


class Model(nn.Module):
    """Hidden states of token ids, made by `mix`."""

    def __init__(self, mix: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(100, 16)
        self.layer = nn.Linear(16, 16)
        self.mix = mix

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.mix(self.layer(self.table(input_ids)), attention_mask),)


TEXTS = [array("q", range(1, size)) for size in (4, 7, 12, 25, 60)]
TASK: Any = SimpleNamespace(onnx_outputs=("last_hidden_state",), pad_id=0)


def masked_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    weights = mask[..., None].float()
    return x + (x * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True)


def in_blocks(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Only lengths that are multiples of 16."""
    more = -x.shape[1] % 16
    if more:
        x = torch.cat([x, x.new_zeros(x.shape[0], more, x.shape[2])], 1)
    found = x.view(x.shape[0], x.shape[1] // 16, 16, 16).reshape(x.shape)
    return found[:, : found.shape[1] - more]


def not_of_two(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return x * 1 if x.shape[1] != 2 else x


@pytest.mark.parametrize(
    ("mix", "layout"),
    [
        (masked_mean, Layout()),
        (lambda x, mask: x + x.mean(1, keepdim=True), Layout(ragged=False)),
        (not_of_two, Layout(least=8)),
        (in_blocks, Layout(multiple=16, least=32)),
    ],
    ids=["any", "one length", "at least 8", "blocks"],
)
def test_layouts(mix: Any, layout: Layout, tmp_path: Path) -> None:
    model = Model(mix).eval()
    assert write_program(NAME, tmp_path / "x.pt2", model, TASK, TEXTS) == layout
    assert Layout.from_json(check_archive(tmp_path / "x.pt2")) == layout
    # The model is as it was.
    assert model.layer.weight.dtype is torch.float32


def test_lengths_that_a_program_takes() -> None:
    seen: list[Any] = []

    def run(ids: torch.Tensor, mask: torch.Tensor, types: torch.Tensor) -> torch.Tensor:
        seen.append((ids.tolist(), mask.tolist()))
        return ids[..., None].expand(-1, -1, 2).float()

    ids, mask = np.array([[1, 2, 3]]), np.array([[1, 1, 0]])
    found = shaped(run, Layout(single=True, multiple=2, least=4), (ids, mask, mask * 0), 9)
    assert seen == [([[1, 2, 3, 9]], [[1, 1, 0, 0]])]
    assert found[..., 0].tolist() == [[1, 2, 3]]


@pytest.mark.parametrize("text", ["{}", "[]", "x", '{"single": 1, "multiple": 1, "least": 1, "ragged": true}'])
def test_damaged_layouts(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        Layout.from_json(text)


def test_the_error_names_the_layer_and_the_reason(tmp_path: Path) -> None:
    class Choosing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    model = Model(lambda x, mask: x)
    model.choosing = Choosing()
    model.mix = lambda x, mask: model.choosing(x)
    with pytest.raises(NotSupportedError, match=r"choosing \(Choosing\): GuardOnDataDependentSymNode: Could not guard"):
        write_program(NAME, tmp_path / "x.pt2", model.eval(), TASK, TEXTS)
    assert not (tmp_path / "x.pt2").exists()


def test_a_program_that_torch_does_not_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-2's, as transformers traces it."""

    def save(*_: Any, **__: Any) -> None:
        raise TypeError("Failed serializing node flat_apply in graph")

    monkeypatch.setattr(torch.export, "save", save)
    model = Model(lambda x, mask: x).eval()
    with pytest.raises(NotSupportedError, match="does not save it: Failed serializing node flat_apply"):
        write_program(NAME, tmp_path / "x.pt2", model, TASK, TEXTS)


def test_all_of_torch_ext_is_no_choice_of_one(capsys: pytest.CaptureFixture[str]) -> None:
    """What `deploy run` asks for, which writes no ONNX."""
    from deploy import run
    from deploy.export.cli import _allowed
    from deploy.export.errors import ExportError

    asked = run.VARIANTS.split(",")
    assert _allowed("fnet", False, SimpleNamespace(variants=asked)) == [NAME]
    assert capsys.readouterr().err == f"note: torch_ext does not run fnet models; writing {NAME}\n"
    assert _allowed("bert", True, SimpleNamespace(variants=asked)) == asked
    with pytest.raises(ExportError, match="torch_ext does not run fnet models yet"):
        _allowed("fnet", False, SimpleNamespace(variants=asked[:1]))


def test_where_torch_export_fails_onnx_is_left(
    tiny_model: ModelMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(name: str, *rest: Any) -> None:
        raise NotSupportedError(f"{name}: layer 3 (Attention): it has a choice")

    monkeypatch.setattr("deploy.export.write_program.write_program", fails)
    model = str(tiny_model("squeezebert"))
    quick = QUICK[:-2]
    assert main([model, "-o", str(tmp_path / "a"), *quick, "--variants", f"{NAME},onnx-fp32"]) == 0
    assert f"warning: {NAME} is left out of the bundle: {NAME}: layer 3 (Attention)" in capsys.readouterr().err
    assert list(load_manifest(tmp_path / "a").variants) == ["onnx-fp32"]
    # Neither: one error with both reasons.
    monkeypatch.setitem(sys.modules, "optimum", None)
    assert main([model, "-o", str(tmp_path / "b"), *quick]) == 2
    assert "error: torch-export-bf16: layer 3 (Attention): it has a choice" in capsys.readouterr().err
