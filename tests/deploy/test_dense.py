"""Linear stages behind the pooling: embeddings of sentence-transformers with Dense modules."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from server_harness import ask

from deploy.bundle import Dense, load_manifest
from deploy.export.cli import main
from deploy.server.limits.bounds import Limits
from deploy.server.limits.callers import Caller

QUICK = ["--max-texts", "12", "--speed-seconds", "0", "--quiet"]
TEXTS = ["the name of the file", "", "returns the values of all objects"]
LIMITS = Limits(inputs=100, chars=5000, values=1 << 20)

ModelMaker = Callable[..., Path]


def save(model: Path, target: Path, stages: Sequence[tuple[int, str, bool]], normalize: bool) -> Any:
    """Saves a model with Dense modules as sentence-transformers does, and returns it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        from sentence_transformers import SentenceTransformer, models

        torch.manual_seed(1)
        modules: list[Any] = [models.Transformer(str(model)), models.Pooling(64, pooling_mode="mean")]
        width = 64
        for outputs, activation, bias in stages:
            modules.append(models.Dense(width, outputs, bias, getattr(torch.nn, activation)()))
            width = outputs
        if normalize:
            modules.append(models.Normalize())
        made = SentenceTransformer(modules=modules, device="cpu")
        made.save(str(target))
        return made


@pytest.mark.parametrize(
    ("stages", "normalize", "variants"),
    [
        ([(32, "Tanh", True)], True, "torch_ext-fp32,torch_ext-bf16,torch_ext-int8,onnx-fp32,onnx-int8"),
        ([(96, "Identity", False), (48, "Identity", True)], False, "torch_ext-fp32"),
        ([(96, "GELU", True), (40, "Identity", False)], True, "torch_ext-fp32,onnx-fp32"),
        ([(96, "LeakyReLU", True), (40, "Sigmoid", True)], True, "torch_ext-fp32,torch_ext-bf16,onnx-fp32"),
    ],
)
def test_embeddings_are_those_of_sentence_transformers(
    stages: list[tuple[int, str, bool]], normalize: bool, variants: str, tiny_model: ModelMaker, tmp_path: Path
) -> None:
    expected = save(tiny_model(), tmp_path / "model", stages, normalize).encode(TEXTS)
    assert main([str(tmp_path / "model"), "-o", str(tmp_path / "out"), "--variants", variants, *QUICK]) == 0
    manifest = load_manifest(tmp_path / "out")
    assert (manifest.width, manifest.hidden_size) == (stages[-1][0], 64)
    if len(stages) == 1:
        assert manifest.dense == (Dense(32, "tanh"),)
    # The weights are in the files of torch_ext, and in one for the others.
    assert ("dense.npz" in manifest.files) == ("onnx" in variants)
    for name in manifest.variants:
        result = ask(manifest, name, lambda service: service.embed(TEXTS, Caller(), LIMITS))
        found = np.asarray(list(result.values))
        assert found.shape == expected.shape
        if name.endswith("fp32"):
            np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
        cosines = (found * expected).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
        assert cosines.min() > (0.95 if name == "onnx-int8" else 0.98 if "int8" in name else 0.999), name
        cut = ask(manifest, name, lambda service: service.embed(TEXTS, Caller(), LIMITS, normalize=True, dimensions=8))
        short = found[:, :8] / np.linalg.norm(found[:, :8], axis=1, keepdims=True)
        if name != "onnx-int8":  # Whose results depend on the batch.
            np.testing.assert_allclose(np.asarray(list(cut.values)), short, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation_function": "torch.nn.modules.activation.Hardtanh"}, "Hardtanh is not supported"),
        ({"activation_function": "my_code.Activation"}, "my_code.Activation is not supported"),
        ({"module_input_name": "token_embeddings"}, "elsewhere than between Pooling and Normalize"),
        ({"out_features": 31}, "expected out_features=32, as model.safetensors has it, got 31"),
    ],
)
def test_stages_that_are_refused(
    change: dict[str, str], message: str, tiny_model: ModelMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tiny_model(), tmp_path / "model", [(32, "Tanh", True)], False)
    path = tmp_path / "model" / "2_Dense" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **change}), encoding="utf-8")
    assert main([str(tmp_path / "model"), "-o", str(tmp_path / "out"), *QUICK]) == 2
    assert message in capsys.readouterr().err


def test_weights_that_cannot_be_read(
    tiny_model: ModelMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tiny_model(), tmp_path / "model", [(32, "Tanh", True)], False)
    for name in ("model.safetensors", "pytorch_model.bin"):
        (tmp_path / "model" / "2_Dense" / name).unlink(missing_ok=True)
    assert main([str(tmp_path / "model"), "-o", str(tmp_path / "out"), *QUICK]) == 2
    assert "weights of a Dense module cannot be read" in capsys.readouterr().err

    class Harmful:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "harm",)

    torch.save({"linear.weight": Harmful()}, tmp_path / "model" / "2_Dense" / "pytorch_model.bin")
    assert main([str(tmp_path / "model"), "-o", str(tmp_path / "out"), *QUICK]) == 2
    assert "2_Dense/pytorch_model.bin: a pickle that is damaged or holds more than weights" in capsys.readouterr().err
    assert not (tmp_path / "harm").exists()
    weights = {"linear.weight": torch.full((32, 64), torch.nan), "linear.bias": torch.zeros(32)}
    torch.save(weights, tmp_path / "model" / "2_Dense" / "pytorch_model.bin")
    assert main([str(tmp_path / "model"), "-o", str(tmp_path / "out"), *QUICK]) == 2
    assert "2_Dense: expected finite weights of a Dense module" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "model")
    save(tiny_model(), tmp_path / "model", [(32, "Tanh", True), (16, "Tanh", True), (8, "Tanh", True)], False)
    assert main([str(tmp_path / "model"), "-o", str(tmp_path / "out"), *QUICK]) == 2
    assert "expected at most 2 Dense modules with an activation between them, got 3" in capsys.readouterr().err
