"""Memory that it takes to load a folder of Hugging Face, at its peak, in units of the packed weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

VOCABULARY, WIDTH, LAYERS = 30_000, 512, 4

# Prints the peak of the process's memory, mapped files included, less what it had before, and the size of the packed
# weights, both in bytes. The first encoder brings in what libraries load once.
PROGRAM = """
import re, sys
from pathlib import Path

def memory(field):
    return int(re.search(rf"^{field}:\\s+(\\d+)", Path("/proc/self/status").read_text(), re.MULTILINE)[1]) << 10

warm, folder, module, dtype, head = sys.argv[1:]
more = {"head": head} if head else {}
if module == "runtime":
    from torch_ext.runtime import Encoder
else:
    from torch_ext import Encoder
Encoder.from_pretrained(warm, dtype)
Path("/proc/self/clear_refs").write_text("5")
before = memory("VmRSS")
encoder = Encoder.from_pretrained(folder, dtype, **more)
peak = memory("VmHWM") - before
print(peak, encoder.image_bytes if module == "runtime" else encoder._packed.nbytes)
"""


def weights_of(vocabulary: int, width: int, layers: int, head: bool) -> dict[str, Tensor]:
    """Those of a BERT, with an output layer over the vocabulary of its own or without."""
    generator = torch.Generator().manual_seed(0)
    weights: dict[str, Tensor] = {}

    def add(name: str, *shape: int) -> None:
        weights[name] = torch.randn(shape, generator=generator) * 0.02

    def add_layer(name: str, outputs: int, inputs: int) -> None:
        add(f"{name}.weight", outputs, inputs)
        add(f"{name}.bias", outputs)

    def add_norm(name: str) -> None:
        add(f"{name}.weight", width)
        add(f"{name}.bias", width)

    for table, rows in (("word", vocabulary), ("position", 64), ("token_type", 2)):
        add(f"bert.embeddings.{table}_embeddings.weight", rows, width)
    add_norm("bert.embeddings.LayerNorm")
    for index in range(layers):
        layer = f"bert.encoder.layer.{index}"
        for part in ("query", "key", "value"):
            add_layer(f"{layer}.attention.self.{part}", width, width)
        add_layer(f"{layer}.attention.output.dense", width, width)
        add_norm(f"{layer}.attention.output.LayerNorm")
        add_layer(f"{layer}.intermediate.dense", 4 * width, width)
        add_layer(f"{layer}.output.dense", width, 4 * width)
        add_norm(f"{layer}.output.LayerNorm")
    if head:
        add_layer("cls.predictions.transform.dense", width, width)
        add_norm("cls.predictions.transform.LayerNorm")
        add_layer("cls.predictions.decoder", vocabulary, width)
    return weights


def save(folder: Path, weights: dict[str, Tensor], shards: int = 1) -> Path:
    """Writes a folder as ``save_pretrained`` does."""
    vocabulary, width = weights["bert.embeddings.word_embeddings.weight"].shape
    folder.mkdir()
    config = {
        "model_type": "bert",
        "architectures": ["BertForMaskedLM"],
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": sum(name.endswith("query.bias") for name in weights),
        "num_attention_heads": 4,
        "intermediate_size": 4 * width,
        "max_position_embeddings": 64,
        "type_vocab_size": 2,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
        return folder
    places = {name: f"part-{number % shards}.safetensors" for number, name in enumerate(weights)}
    for file in set(places.values()):
        save_file({name: weights[name] for name, place in places.items() if place == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


@pytest.mark.anywhere
@pytest.mark.parametrize(
    ("module", "stored", "dtype", "head", "shards", "most"),
    [
        ("runtime", torch.float32, "bf16", "", 1, 1.3),
        ("runtime", torch.float32, "fp32", "", 3, 1.3),
        ("runtime", torch.float16, "bf16", "fill-mask", 1, 1.3),
        # Each weight is packed before all of them are put into one piece; then it gives its memory back.
        ("torch", torch.float16, "bf16", "", 1, 1.4),
        ("torch", torch.float32, "bf16", "", 3, 1.4),
        ("torch", torch.float32, "fp32", "", 1, 1.4),
    ],
)
def test_folders_are_packed_piece_by_piece(
    module: str, stored: torch.dtype, dtype: str, head: str, shards: int, most: float, tmp_path: Path
) -> None:
    small = save(tmp_path / "small", weights_of(100, 64, 1, False))
    weights = {name: tensor.to(stored) for name, tensor in weights_of(VOCABULARY, WIDTH, LAYERS, bool(head)).items()}
    large = save(tmp_path / "large", weights, shards)
    del weights
    arguments = [str(small), str(large), module, dtype, head]
    done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    peak, packed = map(int, done.stdout.split())
    # Pieces of 4 MiB on their way, and what the allocator keeps.
    assert peak < most * packed + (6 << 20), f"{peak / 1e6:.1f} MB at the peak for {packed / 1e6:.1f} MB packed"
    assert peak > 0.9 * packed, "the peak was not seen"
    print(f"{module} {dtype}: {peak / packed:.2f} of {packed / 1e6:.0f} MB")
