"""torch_ext.runtime beside torch's Encoder and Head: bits, arrays of any library, files, processes, threads."""

from __future__ import annotations

import array
import ctypes
import dataclasses
import gc
import itertools
import json
import os
import re
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import torch_ext
from tests.ops.test_encoder import HEAD, SPEC, SPECS, batch, cosine, make_weights
from tests.ops.test_isa import run_all, supported
from torch_ext import Encoder, EncoderSpec, Head, HeadSpec, runtime
from torch_ext.encoder.positions import relative_bias_table, relative_buckets, rotary_table

MODES: tuple[runtime.Pooling, ...] = ("mean", "cls", "max", "lasttoken", "weightedmean", "mean_sqrt_len_tokens")
DTYPES: tuple[torch_ext.encoder.Dtype, ...] = ("bf16", "fp32", "int8")

# Instruction sets whose linear layers PyTorch computes: there are no such layers without it.
FOREIGN = {"amx", "onednn", "torch"}


def equal(actual: Any, expected: Tensor) -> bool:
    """Whether bits are equal; nearly so where PyTorch's kernels compute what it has."""
    ours, theirs = torch.from_dlpack(actual), expected.float()
    if torch_ext.isa_report()["isa"] == runtime.isa_report()["isa"]:
        return torch.equal(ours, theirs)
    return ours.shape == theirs.shape and cosine(ours, theirs) > 0.999


def write(path: Path, generator: torch.Generator, dtype: torch_ext.encoder.Dtype = "bf16") -> Path:
    Encoder(SPEC, make_weights(SPEC, generator), dtype).save(path, Head(HEAD, make_weights(HEAD, generator), dtype))
    return path


@pytest.fixture(name="file")
def fixture_file(generator: torch.Generator, tmp_path: Path) -> Path:
    return write(tmp_path / "encoder.safetensors", generator)


@pytest.fixture(name="encoder")
def fixture_encoder(file: Path) -> runtime.Encoder:
    return runtime.Encoder.open(file, threads=2)


def run_python(program: str, *arguments: str, **options: Any) -> str:
    """What a program prints in another process, which has a minute and a half under emulation, too."""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=240, **options
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- the same results ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_every_architecture_gives_the_same_bits(
    spec: EncoderSpec, dtype: torch_ext.encoder.Dtype, generator: torch.Generator, tmp_path: Path
) -> None:
    weights = make_weights(spec, generator)
    ids, bounds, types = batch(generator)
    if spec.padding_id >= 0:
        ids[::4] = spec.padding_id
    if spec.type_vocab_size < 2:
        types = torch.zeros_like(types)
    expected = Encoder(spec, weights, dtype)
    expected.save(tmp_path / "encoder")
    for threads in (1, 3):
        encoder = runtime.Encoder.open(tmp_path / "encoder", threads=threads)
        states = encoder.encode(ids, bounds, types)
        hidden = expected(ids, bounds, types)
        assert equal(states.hidden(), hidden)
        for mode, normalize in itertools.product(MODES, (False, True)):
            assert equal(states.pool(mode, normalize), torch_ext.pool(hidden, bounds, mode, normalize))
            kept = states.pool(mode, normalize, 5)
            assert kept.shape == (4, 5)
            assert equal(kept, torch_ext.pool(hidden[:, :5].contiguous(), bounds, mode, normalize))
        attended = torch.tensor([2, 9, 1, 7], dtype=torch.int32)
        assert equal(encoder.encode(ids, bounds, types, attended).hidden(), expected(ids, bounds, types, attended))
    assert (encoder.architecture, encoder.dtype, encoder.task) == ("bert", dtype, None)
    assert encoder.spec == dataclasses.asdict(spec)
    assert encoder.head_spec is None
    sizes = (encoder.hidden_size, encoder.num_layers, encoder.max_positions, encoder.vocab_size)
    assert sizes == (spec.hidden_size, spec.num_layers, spec.max_positions, spec.vocab_size)
    assert (encoder.type_vocab_size, encoder.outputs, encoder.threads) == (spec.type_vocab_size, 0, 3)
    assert encoder.isa == runtime.isa_report()["isa"]


HEADS = [
    HEAD,
    dataclasses.replace(HEAD, norm=False, activation="relu", dense_size=20, task="token-classification"),
    HeadSpec("token-classification", 32, "none", False, 1e-5, 2, dense=False),
    dataclasses.replace(HEAD, task="text-classification", activation="tanh", num_outputs=3),
    dataclasses.replace(HEAD, task="text-classification", pooling="mean", num_outputs=1, layer_norm_eps=1e-5),
    HeadSpec("text-classification", 32, "none", False, 1e-5, 7, dense=False, pooling="mean"),
    HeadSpec("question-answering", 32, "none", False, 1e-5, 2, dense=False),
    HeadSpec("feature-extraction", 32, "none", False, 1e-5, 20, dense=False, out_activation="tanh"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", HEADS, ids=str)
def test_every_head_gives_the_same_bits(
    spec: HeadSpec, dtype: torch_ext.encoder.Dtype, generator: torch.Generator, tmp_path: Path
) -> None:
    expected = Encoder(SPEC, make_weights(SPEC, generator), dtype)
    head = Head(spec, make_weights(spec, generator), dtype)
    expected.save(tmp_path / "encoder", head)
    encoder = runtime.Encoder.open(tmp_path / "encoder", threads=2)
    assert (encoder.task, encoder.outputs) == (spec.task, spec.num_outputs)
    assert encoder.head_spec == dataclasses.asdict(spec)
    ids, bounds, types = batch(generator)
    hidden, states = expected(ids, bounds, types), encoder.encode(ids, bounds, types)
    if spec.task == "text-classification":
        assert equal(states.text_logits(), head.classify(hidden, bounds))
        for call in (states.token_logits, lambda: states.top_k([0], 1)):
            with pytest.raises(ValueError, match="expected a head for tokens, this one is for text-classification"):
                call()
        return
    rows = torch.tensor([30, 0, 7, 7])
    logits = head(hidden, rows)
    assert equal(states.token_logits(), head(hidden))
    assert equal(states.token_logits(rows), logits)
    assert equal(states.token_logits(rows.tolist()), logits)
    assert states.token_logits([]).shape == (0, spec.num_outputs)
    k = min(5, spec.num_outputs)
    indices, probabilities = states.top_k(rows, k)
    likeliest = torch.from_dlpack(states.token_logits(rows)).double().softmax(-1).topk(k)
    torch.testing.assert_close(torch.from_dlpack(probabilities).double(), likeliest.values, rtol=1e-5, atol=1e-7)
    assert torch.equal(torch.from_dlpack(indices), likeliest.indices)
    assert [entry.shape for entry in states.top_k([], 1)] == [(0, 1), (0, 1)]
    with pytest.raises(ValueError, match="expected a head for text-classification, this one is for"):
        states.text_logits()
    for wrong in ([31], [-1]):
        with pytest.raises(ValueError, match=rf"expected rows from 0 to 30, got {wrong[0]}"):
            states.token_logits(wrong)
        with pytest.raises(ValueError, match=rf"expected rows from 0 to 30, got {wrong[0]}"):
            states.top_k(wrong, 1)
    for k in (0, -1, spec.num_outputs + 1):
        with pytest.raises(ValueError, match=f"expected k from 1 to {spec.num_outputs}, got {k}"):
            states.top_k(rows, k)
    with pytest.raises(ValueError, match="expected k of at most 32 bits"):
        states.top_k(rows, 2**70)
    with pytest.raises(TypeError, match="expected k as an integer, got str"):
        states.top_k(rows, "5")  # type: ignore[arg-type]
    for dtype_of_rows in (torch.int32, torch.float64):
        with pytest.raises(TypeError, match="expected rows of int64"):
            states.token_logits(rows.to(dtype_of_rows))


def test_a_model_without_a_head_says_so(generator: torch.Generator, tmp_path: Path) -> None:
    Encoder(SPEC, make_weights(SPEC, generator)).save(tmp_path / "encoder")
    states = runtime.Encoder.open(tmp_path / "encoder").encode([1, 2], [0, 2])
    for call in (states.text_logits, states.token_logits, lambda: states.top_k([0], 1), states.sparse):
        with pytest.raises(ValueError, match="this model has no head"):
            call()


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_stages_come_after_the_pooling(
    dtype: torch_ext.encoder.Dtype, generator: torch.Generator, tmp_path: Path
) -> None:
    """Embeddings are what the head makes of pooled states; then they are cut, then they get length 1."""
    for width, activation in ((20, "tanh"), (48, "none")):
        spec = HeadSpec("feature-extraction", 32, "none", False, 1e-5, width, dense=False, out_activation=activation)
        expected = Encoder(SPEC, make_weights(SPEC, generator), dtype)
        head = Head(spec, make_weights(spec, generator), dtype)
        expected.save(tmp_path / "encoder", head)
        encoder = runtime.Encoder.open(tmp_path / "encoder", threads=2)
        assert (encoder.embedding_size, encoder.hidden_size) == (width, 32)
        ids, bounds, types = batch(generator)
        hidden, states = expected(ids, bounds, types), encoder.encode(ids, bounds, types)
        assert equal(states.hidden(), hidden)
        for mode in MODES:
            whole = head(torch_ext.pool(hidden, bounds, mode))
            assert equal(states.pool(mode), whole)
            cut = torch.nn.functional.normalize(whole[:, :5])
            torch.testing.assert_close(torch.from_dlpack(states.pool(mode, True, 5)), cut, rtol=1e-2, atol=1e-2)
        with pytest.raises(ValueError, match=f"expected dimensions from 0 to {width}"):
            states.pool("mean", dimensions=width + 1)


@pytest.mark.parametrize("total", [False, True])
@pytest.mark.parametrize("twice", [False, True])
def test_sparse_vectors(twice: bool, total: bool, generator: torch.Generator, tmp_path: Path) -> None:
    """Those of SPLADE, of texts of which a part is computed at a time: their logits are more than fits."""
    head = dataclasses.replace(HEAD, num_outputs=70_000)
    Encoder(SPEC, make_weights(SPEC, generator), "fp32").save(
        tmp_path / "encoder", Head(head, make_weights(head, generator), "fp32")
    )
    lengths = (1, 15, 15, 3, 15, 15, 2, 15)  # 59 rows of logits fit into 16 MiB: the fifth text is cut.
    bounds = list(itertools.accumulate(lengths, initial=0))
    ids = torch.randint(0, SPEC.vocab_size, (bounds[-1],), generator=generator)
    states = runtime.Encoder.open(tmp_path / "encoder", threads=2).encode(ids, bounds)
    logits = torch.from_dlpack(states.token_logits())
    activated = logits.clamp(min=0).log1p()
    activated = activated.log1p() if twice else activated
    starts, indices, values = (torch.from_dlpack(part)[0] for part in states.sparse(total=total, twice=twice))
    assert starts.tolist()[0] == 0
    assert len(starts) == len(lengths) + 1
    for text in range(len(lengths)):
        rows = activated[bounds[text] : bounds[text + 1]]
        expected = rows.sum(0) if total else rows.amax(0)
        found = torch.zeros(head.num_outputs)
        entries = slice(int(starts[text]), int(starts[text + 1]))
        assert indices[entries].diff().min() > 0
        found[indices[entries]] = values[entries]
        assert (values[entries] != 0).all()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_sparse_vectors_keep_what_is_not_finite(generator: torch.Generator, tmp_path: Path) -> None:
    weights = make_weights(SPEC, generator)
    weights["embeddings.word"][7] = float("nan")
    head = dataclasses.replace(HEAD, num_outputs=50)
    Encoder(SPEC, weights, "fp32").save(tmp_path / "encoder", Head(head, make_weights(head, generator), "fp32"))
    states = runtime.Encoder.open(tmp_path / "encoder").encode([1, 2, 3, 7, 4, 1, 2], [0, 2, 5, 7])
    starts, _, values = (torch.from_dlpack(part)[0] for part in states.sparse())
    finite = [bool(values[first:last].isfinite().all()) for first, last in itertools.pairwise(starts.tolist())]
    assert finite == [True, False, True]


def test_a_file_of_fp32_runs_as_bf16(generator: torch.Generator, tmp_path: Path) -> None:
    path = write(tmp_path / "encoder", generator, "fp32")
    ids, bounds, types = batch(generator)
    for dtype in ("fp32", "bf16"):
        encoder = runtime.Encoder.open(path, dtype)
        assert encoder.dtype == dtype
        hidden = Encoder.load(path, dtype)(ids, bounds, types)
        states = encoder.encode(ids, bounds, types)
        assert equal(states.hidden(), hidden)
        head = Head.load(path, dtype)
        assert head is not None
        assert equal(states.token_logits(), head(hidden))
    assert runtime.Encoder.open(path).dtype == "fp32"


@pytest.mark.parametrize("keep", ["layers.0", "*.ffn.down", "*"])
def test_a_file_of_int8_keeps_layers_in_bf16(keep: str, generator: torch.Generator, tmp_path: Path) -> None:
    weights = Encoder.balanced(SPEC, make_weights(SPEC, generator))
    expected = Encoder(SPEC, weights, "int8", keep)
    expected.save(tmp_path / "encoder")
    assert any(name.endswith("residual_scale") for name in load_file(tmp_path / "encoder"))
    ids, bounds, types = batch(generator)
    encoder = runtime.Encoder.open(tmp_path / "encoder")
    assert encoder.dtype == "int8"
    assert equal(encoder.encode(ids, bounds, types).hidden(), expected(ids, bounds, types))


# 2,000 texts. Batches are large enough that threads take parts of them on their own.
ISA_PROGRAM = """
import json, sys, torch, torch_ext
from torch_ext import runtime
path, *modes, name = sys.argv[1:]
report = runtime.isa_report()
assert (report["isa"], report["forced"]) == (name, True), report
generator = torch.Generator().manual_seed(1)
for dtype in ("bf16", "fp32", "int8"):
    expected, head = torch_ext.Encoder.load(path + dtype, dtype), torch_ext.Head.load(path + dtype, dtype)
    encoders = [runtime.Encoder.open(path + dtype, threads=threads) for threads in (1, 2)]
    for turn in range(20):
        lengths = torch.randint(1, 20, (100,), generator=generator)
        bounds = torch.cat([torch.zeros(1), lengths.cumsum(0)]).to(torch.int32)
        ids = torch.randint(0, 50, (int(bounds[-1]),), generator=generator)
        attended = (bounds.diff() * 2 + 2) // 3 if turn % 2 else None
        hidden = expected(ids, bounds, None, attended)
        states = encoders[turn % 2].encode(ids, bounds, None, attended)
        assert torch.equal(torch.from_dlpack(states.hidden()), hidden.float()), dtype
        assert torch.equal(torch.from_dlpack(states.token_logits()), head(hidden)), dtype
        for mode in modes:
            pooled = torch_ext.pool(hidden, bounds, mode, True)
            assert torch.equal(torch.from_dlpack(states.pool(mode, True)), pooled), (dtype, mode)
print("equal")
"""


def test_every_instruction_set_gives_the_same_bits(generator: torch.Generator, tmp_path: Path) -> None:
    for dtype in DTYPES:
        write(tmp_path / dtype, generator, dtype)
    names = [name for name in supported() if name not in FOREIGN]
    for process in run_all(ISA_PROGRAM, names, f"{tmp_path}/", *MODES):
        assert process.stdout == "equal\n", f"{process.args}: {process.stdout}{process.stderr}"


def test_instruction_sets_that_need_torch_are_refused(file: Path) -> None:
    names = [name for name in supported() if name in FOREIGN - {"amx"}]
    program = f"from torch_ext import runtime; runtime.Encoder.open({str(file)!r})"
    for process in run_all(program, [*names, "avx1024"]):
        assert process.returncode == 1
        assert "TORCH_EXT_ISA" in process.stderr


@pytest.mark.parametrize("theta", [10000.0, 160000.0])
def test_rotary_tables_are_those_of_transformers(theta: float) -> None:
    """As modeling_rope_utils and ModernBERT compute them: fp32 frequencies and angles, then cosine and sine.

    PyTorch's powers, cosines and sines are vectorized and may be off in the last place; ours are rounded correctly.
    """
    spec = dataclasses.replace(SPEC, max_positions=8192, hidden_size=64, num_heads=1, rotary_theta=theta)
    frequencies = 1.0 / (theta ** (torch.arange(0, 64, 2, dtype=torch.int64).float() / 64))
    angles = torch.arange(8192).float()[:, None] * frequencies
    table = rotary_table(spec, theta)
    # The last place of a power, and with it of an angle, may differ: up to 8192 * 2^-23 for the first pairs.
    exact = 1.0 / np.float32(theta) ** (np.arange(0, 64, 2, dtype=np.float32) / np.float32(64)).astype(np.float64)
    assert np.abs(frequencies.numpy() / exact - 1).max() < 3e-7
    bound = 2**-23 + angles * 2**-21
    for ours, theirs in ((table[:, :32], angles.cos()), (table[:, 32:], angles.sin())):
        assert ((ours - theirs).abs() <= bound).all()
    # From our own frequencies on, nothing but the rounding of the result is left.
    power = np.power(np.float64(np.float32(theta)), (np.arange(0, 64, 2) / 64)).astype(np.float32)
    ours = torch.from_numpy(np.float32(1) / power)
    angles = (torch.arange(8192).float()[:, None] * ours).double()
    assert torch.equal(table, torch.cat((angles.cos(), angles.sin()), 1).float())


@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (4, 2), (8, 6), (16, 128), (64, 512), (320, 1000)])
def test_relative_biases_are_those_of_transformers(buckets: int, distance: int) -> None:
    heads = 2
    spec = dataclasses.replace(
        SPEC, num_heads=heads, relative_attention_buckets=buckets, relative_attention_max_distance=distance
    )
    # Each bucket has its number for a bias.
    bias = torch.arange(buckets).float()[:, None] * torch.tensor([1.0, -1.0])
    distances = torch.arange(-distance, distance + 1)
    expected = relative_buckets(distances, buckets, distance).float()
    assert torch.equal(relative_bias_table(spec, bias), torch.stack((expected, -expected)))


@pytest.mark.needs_transformers
@pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers", "ignore::FutureWarning:transformers")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "kind", ["ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMaskedLM"]
)
def test_models_of_transformers(
    kind: str,
    dtype: torch_ext.encoder.Dtype,
    generator: torch.Generator,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tests.ops import test_transformers

    monkeypatch.setattr(test_transformers, "transformers", pytest.importorskip("transformers"))
    for name in test_transformers.HEADS:
        model = test_transformers.make(kind, name, **test_transformers.outputs(kind))
        expected, head = Encoder.from_transformers(model, dtype), Head.from_transformers(model, dtype)
        expected.save(tmp_path / "encoder", head)
        encoder = runtime.Encoder.open(tmp_path / "encoder")
        ids, bounds = test_transformers.batch(generator)
        hidden, states = expected(ids, bounds), encoder.encode(ids, bounds)
        assert equal(states.hidden(), hidden), name
        if kind == "ForSequenceClassification":
            assert equal(states.text_logits(), head.classify(hidden, bounds)), name
        else:
            assert equal(states.token_logits(), head(hidden)), name


# ---- what comes in ---------------------------------------------------------------------------------------------------


class OnlyDLPack:
    """An array of a library without the buffer protocol."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __dlpack__(self, **options: Any) -> Any:
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.tensor.__dlpack_device__()


def read_only(values: Any) -> Any:
    values.setflags(write=False)
    return values


def strided(values: Any) -> Any:
    """The same numbers, every other element of a larger array."""
    wide = np.full(2 * len(values) + 1, -7, values.dtype)
    wide[1::2] = values
    return wide[1::2]


FORMS: dict[str, Callable[[Tensor], Any]] = {
    "torch": lambda t: t,
    "torch, strided": lambda t: torch.stack((t, t * 0 - 7), 1)[:, 0],
    "DLPack": OnlyDLPack,
    "numpy": lambda t: t.numpy(),
    "numpy, strided": lambda t: strided(t.numpy()),
    "numpy, backwards": lambda t: t.numpy()[::-1].copy()[::-1],
    "numpy, read-only": lambda t: read_only(t.numpy().copy()),
    "numpy, unaligned": lambda t: np.frombuffer(b"x" + t.numpy().tobytes(), t.numpy().dtype, offset=1),
    "array": lambda t: array.array("q" if t.dtype == torch.int64 else "i", t.tolist()),
    "memoryview": lambda t: memoryview(t.numpy()),
    "memoryview, cast": lambda t: memoryview(t.numpy().tobytes()).cast("q" if t.dtype == torch.int64 else "i"),
    "memoryview, strided": lambda t: memoryview(strided(t.numpy())),
    "ctypes": lambda t: ((ctypes.c_int64 if t.dtype == torch.int64 else ctypes.c_int32) * len(t))(*t.tolist()),
    "list": lambda t: t.tolist(),
    "tuple": lambda t: tuple(t.tolist()),
}


@pytest.mark.parametrize("form", FORMS)
def test_arrays_of_any_library(form: str, encoder: runtime.Encoder, generator: torch.Generator) -> None:
    ids, bounds, types = batch(generator)
    expected = encoder.encode(ids, bounds, types).hidden().tolist()
    form_of = FORMS[form]
    assert encoder.encode(form_of(ids), form_of(bounds), form_of(types)).hidden().tolist() == expected
    without = encoder.encode(ids, bounds, torch.zeros_like(types)).hidden().tolist()
    assert encoder.encode(form_of(ids), form_of(bounds)).hidden().tolist() == without


def test_what_was_given_is_let_go(encoder: runtime.Encoder) -> None:
    ids = np.array([1, 2, 3])
    before = sys.getrefcount(ids)
    for _ in range(10):
        encoder.encode(ids, [0, 3])
        with pytest.raises(TypeError):
            encoder.encode(ids, ids)
    tensor = torch.from_numpy(ids)
    for _ in range(10):
        encoder.encode(tensor, [0, 3])
        with pytest.raises(TypeError):
            encoder.encode(tensor, tensor)
    del tensor
    gc.collect()
    assert sys.getrefcount(ids) == before


class Broken:
    def __dlpack__(self, **options: Any) -> Any:
        raise BufferError("no tensor")


WRONG: list[tuple[type[Exception], str, Callable[[Tensor, Tensor, Tensor], tuple[Any, ...]]]] = [
    (TypeError, "expected input_ids of int64, got int32", lambda i, c, t: (i.int(), c)),
    (TypeError, "expected input_ids of int64, got float32", lambda i, c, t: (i.float(), c)),
    (TypeError, "expected input_ids of int64, got uint8", lambda i, c, t: (i.byte(), c)),
    (TypeError, "expected input_ids of int64, got bool8", lambda i, c, t: (i > 3, c)),
    (TypeError, "expected input_ids of int64, got bfloat16", lambda i, c, t: (i.bfloat16(), c)),
    (TypeError, "expected input_ids of int64, got i", lambda i, c, t: (i.int().numpy(), c)),
    (TypeError, "expected input_ids of int64, got d", lambda i, c, t: (i.double().numpy(), c)),
    (TypeError, "expected input_ids of int64, got L", lambda i, c, t: (i.numpy().astype(np.uint64), c)),
    (TypeError, "expected input_ids of int64, got >", lambda i, c, t: (i.numpy().astype(">i8"), c)),
    (TypeError, "expected input_ids of int64, got ", lambda i, c, t: (i.numpy().astype(object), c)),
    (TypeError, "expected input_ids of int64, got B", lambda i, c, t: (bytes(8), c)),
    (TypeError, "expected input_ids as an array of int64 .* got str", lambda i, c, t: ("12", c)),
    (TypeError, "expected input_ids as an array of int64 .* got NoneType", lambda i, c, t: (None, c)),
    (TypeError, "expected a list of integers or an array of int64", lambda i, c, t: ([1.5, 2.0], [0, 2])),
    (TypeError, "expected a list of integers or an array of int64", lambda i, c, t: ([[1, 2]], [0, 2])),
    (ValueError, "expected integers of 64 bits", lambda i, c, t: ([2**63], [0, 1])),
    (ValueError, "expected integers of 32 bits", lambda i, c, t: ([1], [0, 2**31])),
    (TypeError, "expected cu_seqlens of int32, got int64", lambda i, c, t: (i, c.long())),
    (TypeError, "expected token_type_ids of int64, got float32", lambda i, c, t: (i, c, t.float())),
    (BufferError, "no tensor", lambda i, c, t: (Broken(), c)),
    (ValueError, "input_ids with 1 dimension, got 2: texts are concatenated", lambda i, c, t: (i[None], c)),
    (ValueError, "input_ids with 1 dimension, got 0", lambda i, c, t: (np.array(3), c)),
    (ValueError, "at least one text", lambda i, c, t: (i[:0], c[:1] * 0)),
    (ValueError, "at least one text", lambda i, c, t: ([], [])),
    (ValueError, "text 0 has no tokens", lambda i, c, t: ([], [0, 0])),
    (ValueError, "got 3 then 3: text 1 has no tokens", lambda i, c, t: (i, [0, 3, 3, 23, 31])),
    (ValueError, "expected cu_seqlens to rise, got 9 then 3", lambda i, c, t: (i, [0, 9, 3, 31])),
    (ValueError, "from 0 to 31 .tokens., got 1 to 31", lambda i, c, t: (i, [1, 31])),
    (ValueError, "from 0 to 31 .tokens., got 0 to 30", lambda i, c, t: (i, [0, 15, 30])),
    (ValueError, "from 0 to 31 .tokens., got 0 to -31", lambda i, c, t: (i, [0, 15, -31])),
    (ValueError, "text 1 has 21 tokens, the model takes at most 20: truncate it", lambda i, c, t: (i, [0, 3, 24, 31])),
    (ValueError, r"expected token_type_ids \[31\], got \[30\]", lambda i, c, t: (i, c, t[:30])),
    (ValueError, "expected token_type_ids from 0 to 1, got 2 at ", lambda i, c, t: (i, c, t + 1)),
    (TypeError, "expected attended of int32, got int64", lambda i, c, t: (i, c, t, c.diff().long())),
    (ValueError, r"expected attended \[4\], a number for each text, got \[2\]", lambda i, c, t: (i, c, t, [1, 1])),
    (ValueError, "attended from 1 to the 3 tokens of text 0, got 0", lambda i, c, t: (i, c, t, [0, 1, 1, 1])),
    (ValueError, "attended from 1 to the 1 tokens of text 2, got 2", lambda i, c, t: (i, c, t, [3, 1, 2, 1])),
    (ValueError, "expected input_ids from 0 to 49, got -[0-9]+ at ", lambda i, c, t: (i - i.max() - 1, c)),
    (
        ValueError,
        "from 0 to 49, got 9223372036854775807 at 0",
        lambda i, c, t: ([2**63 - 1], [0, 1]),
    ),
    # More than there is memory for, without being any.
    (MemoryError, "no memory for a copy", lambda i, c, t: (np.broadcast_to(np.int64(1), (1 << 50,)), c)),
]


@pytest.mark.parametrize(("error", "match", "arguments"), WRONG, ids=[entry[1] for entry in WRONG])
def test_wrong_arguments(
    error: type[Exception],
    match: str,
    arguments: Callable[[Tensor, Tensor, Tensor], tuple[Any, ...]],
    encoder: runtime.Encoder,
    generator: torch.Generator,
) -> None:
    ids, bounds, types = batch(generator)
    types[0] = 1
    expected = encoder.encode(ids, bounds, types).hidden().tolist()
    with pytest.raises(error, match=match):
        encoder.encode(*arguments(ids, bounds, types))
    assert encoder.encode(ids, bounds, types).hidden().tolist() == expected


def test_a_model_without_token_types(generator: torch.Generator, tmp_path: Path) -> None:
    spec = dataclasses.replace(SPEC, type_vocab_size=0)
    Encoder(spec, make_weights(spec, generator)).save(tmp_path / "encoder")
    encoder = runtime.Encoder.open(tmp_path / "encoder")
    expected = encoder.encode([1, 2], [0, 2]).hidden().tolist()
    assert encoder.encode([1, 2], [0, 2], [0, 0]).hidden().tolist() == expected
    with pytest.raises(ValueError, match="token_type_ids from 0 to 0, got 1 at 1"):
        encoder.encode([1, 2], [0, 2], [0, 1])


def test_poolings_are_checked(encoder: runtime.Encoder) -> None:
    states = encoder.encode([1, 2], [0, 2])
    with pytest.raises(ValueError, match=r"expected a pooling of mean, cls, max, lasttoken, .*; got 'median'"):
        states.pool("median")  # type: ignore[arg-type]
    for dimensions in (33, 10**9):
        with pytest.raises(ValueError, match=f"expected dimensions from 0 to 32, got {dimensions}"):
            states.pool("mean", dimensions=dimensions)
    for dimensions in (0, -1, -(2**70)):
        with pytest.raises(ValueError, match=f"expected dimensions of at least 1, got {dimensions}"):
            states.pool("mean", dimensions=dimensions)
    with pytest.raises(ValueError, match="expected skipped of at least 0, got -1"):
        states.pool("mean", skipped=-1)
    for name in ("dimensions", "skipped"):
        with pytest.raises(ValueError, match=f"expected {name} of at most 32 bits, got {2**70}"):
            states.pool("mean", **{name: 2**70})
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("the name of a pooling, got NoneType", {"mode": None}),
        ("dimensions as an integer, got str", {"dimensions": "5"}),
        ("dimensions as an integer, got float", {"dimensions": 5.0}),
        ("skipped as an integer, got NoneType", {"skipped": None}),
    ]
    for match, options in wrong:
        with pytest.raises(TypeError, match=f"Encoder: expected {match}"):
            states.pool(**options)


# ---- what goes out ---------------------------------------------------------------------------------------------------


def test_results_are_arrays_without_a_copy(encoder: runtime.Encoder, generator: torch.Generator) -> None:
    result = encoder.encode(*batch(generator)).pool("mean")
    assert result.shape == (4, 32)
    assert len(result) == 4
    view = memoryview(result)
    assert (view.format, view.itemsize, view.shape, view.strides, view.nbytes) == ("f", 4, (4, 32), (128, 4), 512)
    assert view.c_contiguous
    assert not view.readonly
    numbers = np.asarray(result)
    assert numbers.dtype == np.float32
    tensor = torch.from_dlpack(result)
    assert tensor.data_ptr() == numbers.ctypes.data == np.from_dlpack(result).ctypes.data
    assert result.tolist() == numbers.tolist() == tensor.tolist() == view.tolist()
    assert bytes(view) == numbers.tobytes()
    tensor[0, 0] = 7
    assert view[0, 0] == 7
    assert result.__dlpack_device__() == (1, 0)
    capsule = result.__dlpack__(stream=None, max_version=(1, 0), dl_device=(1, 0), copy=False)
    assert torch.utils.dlpack.from_dlpack(capsule).data_ptr() == tensor.data_ptr()
    copied = torch.utils.dlpack.from_dlpack(result.__dlpack__(copy=True))
    assert copied.data_ptr() != tensor.data_ptr()
    assert torch.equal(copied, tensor)
    with pytest.raises(BufferError, match="it is on the CPU, not on device type 2"):
        result.__dlpack__(dl_device=(2, 0))
    assert np.asfortranarray(result).tolist() == result.tolist()
    result.__dlpack__()  # a capsule that nobody takes
    with pytest.raises(TypeError):
        type(result)()


@pytest.mark.anywhere
def test_rows_as_json() -> None:
    """The fewest digits that read back as the same number, nearest to it: numpy has them, too."""
    patterns = np.random.default_rng(0).integers(0, 1 << 32, 20_000, dtype=np.uint32)
    edges = np.arange(0, 1 << 32, 1 << 23, dtype=np.uint32)  # Each power of 2 and its neighbours.
    row = np.concatenate([patterns, edges - 1, edges, edges + 1]).view(np.float32)
    row = np.concatenate([row[np.isfinite(row)], np.float32(10) ** np.arange(-45, 39)]).astype(np.float32)
    texts = runtime.json_row(row).decode("ascii").strip("[]").split(",")
    for number, text in zip(row, texts, strict=True):
        assert json.loads(text) == float(np.format_float_scientific(number)), text
        digits = np.format_float_scientific(number, trim="-").partition("e")[0]
        assert re.sub(r"e.*|^[-0.]*|\.", "", text).rstrip("0") == re.sub(r"^[-0.]*|\.", "", digits).rstrip("0")
    given = [0.1, -0.0, 1.0, 123456.7, 1e13, 1e12, 1e-5, 1.5e-7, -3e38, 16777216.0, float("nan"), -float("inf")]
    expected = b"[0.1,-0.0,1.0,123456.7,1e13,1000000000000.0,0.00001,1.5e-7,-3e38,16777216.0,null,null]"
    assert runtime.json_row(array.array("f", given)) == expected
    assert runtime.json_row(array.array("f")) == b"[]"


@pytest.mark.anywhere
def test_finite_rows() -> None:
    rows = np.zeros((4, 37), np.float32)
    rows[0], rows[1, 36], rows[2, 0], rows[3] = 3e38, np.nan, -np.inf, 1e-45
    assert runtime.finite_rows(rows) == bytes([1, 0, 0, 1])
    assert runtime.finite_rows(rows[:0]) == b""


@pytest.mark.anywhere
@pytest.mark.parametrize("function", [runtime.json_row, runtime.finite_rows])
def test_rows_of_other_kinds(function: Callable[[Any], bytes]) -> None:
    with pytest.raises(TypeError, match=r"expected fp32 numbers \(format f\), got format d"):
        function(array.array("d", [1]))
    with pytest.raises(ValueError, match=r"expected [12] dimensions, got 3"):
        function(np.zeros((1, 1, 1), np.float32))
    with pytest.raises((BufferError, ValueError), match="contiguous"):
        function(np.zeros((4, 4), np.float32)[:, 1 if function is runtime.json_row else slice(0, 4, 2)])
    with pytest.raises(TypeError):
        function([1.0])


def test_results_outlive_what_they_came_from(file: Path) -> None:
    encoder = runtime.Encoder.open(file)
    states = encoder.encode([1, 2, 3], [0, 3])
    expected = states.hidden().tolist()
    pooled, indices = states.pool("cls"), states.top_k([0], 50)[0]
    del encoder
    gc.collect()
    hidden = states.hidden()
    view, numbers, tensor = memoryview(hidden), np.asarray(hidden), torch.from_dlpack(hidden)
    from_numpy = torch.from_numpy(np.asarray(pooled))
    del states, hidden, pooled
    gc.collect()
    # New results do not take the memory.
    again = [runtime.Encoder.open(file).encode([9] * 3, [0, 3]).hidden() for _ in range(3)]
    assert view.tolist() == numbers.tolist() == tensor.tolist() == expected
    assert from_numpy.tolist() == [expected[0]]
    assert sorted(indices.tolist()[0]) == list(range(50))
    assert np.asarray(indices).dtype == np.int64
    assert again[0].tolist() != expected


def test_results_do_not_stay(encoder: runtime.Encoder) -> None:
    """Each is 2 MB of memory: a leak of one in ten would show."""
    ids = [1] * 20 * 800
    states = encoder.encode(ids, list(range(0, len(ids) + 1, 20)))

    def call() -> None:
        hidden = states.hidden()
        torch.from_dlpack(hidden)
        np.asarray(hidden)
        hidden.__dlpack__()

    for _ in range(5):
        call()
    before = resident_kib()
    for _ in range(30):
        call()
    assert resident_kib() - before < 6 * 1024


# ---- files -----------------------------------------------------------------------------------------------------------


def test_a_result_says_its_shape(encoder: runtime.Encoder, generator: torch.Generator) -> None:
    ids, bounds, types = batch(generator, [3, 2])
    states = encoder.encode(ids, bounds, types)
    assert repr(states.hidden()) == f"Array(shape=(5, {encoder.hidden_size}), dtype=fp32)"


@pytest.mark.parametrize("open_file", [runtime.Encoder.open, torch_ext.Encoder.load])
def test_a_folder_in_place_of_a_file_is_told_what_to_call(open_file: Callable[[Path], object], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"got the folder .*: name a file that torch_ext\.Encoder\.save"):
        open_file(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"got the folder .* is read by Encoder\.from_pretrained"):
        open_file(tmp_path)
    for dtype in ("int8", "bf16"):
        (tmp_path / f"encoder_{dtype}.safetensors").touch()
    with pytest.raises(ValueError, match=r"its files, encoder_bf16\.safetensors, encoder_int8\.safetensors"):
        open_file(tmp_path)


@pytest.mark.parametrize("read_folder", [runtime.Encoder.from_pretrained, torch_ext.Encoder.from_pretrained])
def test_a_bundle_in_place_of_a_folder_is_told_what_to_call(
    read_folder: Callable[[Path], object], tmp_path: Path
) -> None:
    config = {"model_type": "bert", "vocab_size": 5, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 8, "max_position_embeddings": 8}))
    (tmp_path / "encoder_bf16.safetensors").touch()
    with pytest.raises(FileNotFoundError, match=r"no weights .* open encoder_bf16\.safetensors by .*Encoder\.open"):
        read_folder(tmp_path)


def test_files_that_cannot_be_read(file: Path, tmp_path: Path, generator: torch.Generator) -> None:
    with pytest.raises(FileNotFoundError, match=r"cannot open .*/none: No such file"):
        runtime.Encoder.open(tmp_path / "none")
    with pytest.raises(ValueError, match="is not a regular file"):
        runtime.Encoder.open(os.devnull)
    with pytest.raises(ValueError, match=r"null byte|zero byte|null character"):
        runtime.Encoder.open("a\0b")
    with pytest.raises(TypeError):
        runtime.Encoder.open(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="holds bf16 weights, fp32 was asked for: load the fp32"):
        runtime.Encoder.open(file, "fp32")
    with pytest.raises(ValueError, match="holds bf16 weights, int8 was asked for"):
        runtime.Encoder.open(file, "int8")
    with pytest.raises(ValueError, match="unknown dtype 'fp16'; known: 'bf16', 'fp32', 'int8'"):
        runtime.Encoder.open(file, "fp16")  # type: ignore[arg-type]
    whole = file.read_bytes()
    for size in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "short").write_bytes(whole[:size])
        with pytest.raises(ValueError, match="short is damaged, or is not a safetensors file: "):
            runtime.Encoder.open(tmp_path / "short")
        with pytest.raises(ValueError, match="short is damaged, or is not a safetensors file"):
            Encoder.load(tmp_path / "short")
    save_file({"a": torch.zeros(2)}, tmp_path / "other")
    with pytest.raises(ValueError, match=r"was not written by torch_ext\.Encoder\.save"):
        runtime.Encoder.open(tmp_path / "other")
    weights = load_file(file)
    metadata = {
        "format": "torch-ext-encoder",
        "format_version": "1",
        "dtype": "bf16",
        "encoder": json.dumps(dataclasses.asdict(SPEC)),
    }
    wrong: list[tuple[dict[str, str], dict[str, Tensor], str]] = [
        ({"format_version": "2"}, {}, "has format version 2, this torch_ext reads 1"),
        ({"encoder": "{}"}, {}, "has no valid specification of the encoder: "),
        ({"encoder": json.dumps({**dataclasses.asdict(SPEC), "x": 1})}, {}, "does not know its field"),
        ({}, {"embeddings.norm.bias": torch.zeros(31)}, r"expected embeddings.norm.bias \[32\], got \[31\]|31 rows"),
        ({}, {"more": torch.zeros(1)}, "unexpected .*more"),
        ({"dtype": "fp64"}, {}, "fp64"),
    ]
    plain = {name: tensor for name, tensor in weights.items() if not name.startswith("head.")}
    for fields, tensors, match in wrong:
        save_file({**plain, **tensors}, tmp_path / "wrong", {**metadata, **fields})
        with pytest.raises(ValueError, match=match):
            runtime.Encoder.open(tmp_path / "wrong")
    save_file(plain, tmp_path / "right", metadata)
    assert runtime.Encoder.open(tmp_path / "right").task is None


def test_paths_of_any_kind(file: Path, tmp_path: Path) -> None:
    """Names of files are bytes; messages about them are text all the same."""
    strange = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xc3\xa9")
    Path(strange).write_bytes(file.read_bytes())
    for path in (strange, Path(strange), os.fsencode(strange)):
        encoder = runtime.Encoder.open(path)  # type: ignore[arg-type]
        encoder.save_image(strange + " image")
        assert runtime.Encoder.open_image(strange + " image").task == "fill-mask"
    with pytest.raises(FileNotFoundError, match="\N{REPLACEMENT CHARACTER}é none: No such file"):
        runtime.Encoder.open(strange + " none")
    # A message is cut between two characters.
    for extra in range(8):
        with pytest.raises((FileNotFoundError, OSError), match="cannot open"):
            runtime.Encoder.open(tmp_path / ("x" * extra + "/é😀" * 300))


def test_weights_in_memory(generator: torch.Generator, tmp_path: Path) -> None:
    weights, head = make_weights(SPEC, generator), make_weights(HEAD, generator)
    ids, bounds, types = batch(generator)
    expected = Encoder(SPEC, weights)
    hidden = expected(ids, bounds, types)
    spec, head_spec = dataclasses.asdict(SPEC), dataclasses.asdict(HEAD)

    def given(**changed: Any) -> dict[str, Any]:
        tensors: dict[str, Any] = {
            name: runtime.Tensor("F32", tuple(tensor.shape), tensor.numpy())
            for name, tensor in {**weights, **head}.items()
        }
        return {**tensors, **changed}

    encoder = runtime.Encoder.pack(spec, given(), head_spec, threads=2)
    states = encoder.encode(ids, bounds, types)
    assert equal(states.hidden(), hidden)
    assert equal(states.token_logits(), Head(HEAD, head)(hidden))
    # Halves, and parts that lie elsewhere: queries, keys and values of a model, say.
    name = "layers.0.attention.qkv.weight"
    parts = [runtime.Tensor("F32", (32, 32), part.contiguous().numpy()) for part in weights[name].chunk(3)]
    states = runtime.Encoder.pack(spec, given(**{name: parts}), head_spec).encode(ids, bounds, types)
    assert equal(states.hidden(), hidden)
    half = {name: runtime.Tensor("F16", tuple(t.shape), t.half().numpy()) for name, t in weights.items()}
    rounded = Encoder(SPEC, {name: tensor.half().float() for name, tensor in weights.items()})
    assert equal(runtime.Encoder.pack(spec, half).encode(ids, bounds, types).hidden(), rounded(ids, bounds, types))
    bias = "embeddings.norm.bias"
    wrong: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({bias: runtime.Tensor("F64", (32,), np.zeros(32))}, ValueError, "dtypes F32, F16, BF16, I8, got 'F64'"),
        (
            {bias: runtime.Tensor("F32", (32,), np.zeros(31, np.float32))},
            ValueError,
            "takes 128 bytes, its buffer has 124",
        ),
        ({bias: runtime.Tensor("F32", (31,), np.zeros(31, np.float32))}, ValueError, "the model: expected embeddings"),
        ({bias: runtime.Tensor("F32", (32,), "no buffer")}, TypeError, "buffer|bytes-like"),
        ({bias: []}, ValueError, "missing embeddings.norm.bias"),
        ({"more": runtime.Tensor("F32", (1,), np.zeros(1, np.float32))}, ValueError, "unexpected more"),
        ({bias: runtime.Tensor("F32", (2**31, 2**31, 4), b"")}, ValueError, "dimensions|bytes|sizes"),
        ({bias: runtime.Tensor("F32", (0,), b"")}, ValueError, f"sizes of {bias} of at least 1"),
        ({bias: runtime.Tensor("F32", (-32,), np.zeros(32, np.float32))}, ValueError, "of at least 1, .*got -32"),
        ({bias: runtime.Tensor("F32", ("32",), np.zeros(32, np.float32))}, TypeError, "as an integer, got str"),  # type: ignore[arg-type]
        ({bias: runtime.Tensor("F32", (), b"1234")}, ValueError, "with 1 or 2 dimensions"),
        ({bias: ("F32", (32,), np.zeros(32, np.float32))}, TypeError, "as a torch_ext.runtime.Tensor, got str"),
        ({bias: 5}, TypeError, "as a torch_ext.runtime.Tensor, got int"),
    ]
    for changed, error, match in wrong:
        with pytest.raises(error, match=match):
            runtime.Encoder.pack(spec, given(**changed), head_spec)
    with pytest.raises(ValueError, match="MiniLM has no valid specification of the encoder: expected hidden_size"):
        runtime.Encoder.pack({**spec, "hidden_size": -1}, given(), head_spec, name="MiniLM")
    with pytest.raises(ValueError, match="MiniLM: expected the weights of an encoder, got none"):
        runtime.Encoder.pack(spec, {}, name="MiniLM")
    for arguments in ((None, given()), (spec, list(given()))):
        with pytest.raises(TypeError, match="as a mapping, got"):
            runtime.Encoder.pack(*arguments)  # type: ignore[arg-type]


# ---- shared images ---------------------------------------------------------------------------------------------------

OPEN_IMAGE = """
import sys
from torch_ext import runtime
source = sys.argv[1]
encoder = runtime.Encoder.open_image(int(source) if source.isdigit() else source, threads=2)
print(encoder.encode([1, 2, 3], [0, 3]).hidden().tolist())
"""


@pytest.mark.anywhere
def test_other_processes_map_the_weights(file: Path, tmp_path: Path) -> None:
    for shared in (True, False):
        encoder = runtime.Encoder.open(file, shared=shared)
        expected = f"{encoder.encode([1, 2, 3], [0, 3]).hidden().tolist()}\n"
        fd = encoder.share()
        try:
            assert not os.get_inheritable(fd)
            assert run_python(OPEN_IMAGE, str(fd), pass_fds=[fd]) == expected
            with pytest.raises(OSError, match="not permitted"):
                os.write(fd, b"x")
        finally:
            os.close(fd)
    encoder.save_image(tmp_path / "image")
    assert run_python(OPEN_IMAGE, str(tmp_path / "image")) == expected
    mapped = runtime.Encoder.open_image(tmp_path / "image")
    assert (mapped.spec, mapped.head_spec, mapped.dtype) == (encoder.spec, encoder.head_spec, encoder.dtype)
    assert mapped.image_bytes == encoder.image_bytes
    fd = mapped.share()
    assert runtime.Encoder.open_image(fd).encode([1, 2, 3], [0, 3]).hidden().tolist() == json.loads(expected)
    os.close(fd)


def test_images_that_cannot_be_mapped(encoder: runtime.Encoder, file: Path, tmp_path: Path) -> None:
    path = tmp_path / "image"
    encoder.save_image(path)
    whole = path.read_bytes()
    assert path.stat().st_mode & 0o777 == 0o444

    def refuse(content: bytes, match: str) -> None:
        path.unlink()
        path.write_bytes(content)
        with pytest.raises(ValueError, match=match):
            runtime.Encoder.open_image(path)

    for size in (0, 8, 247):
        refuse(whole[:size], f"is no image of torch_ext.runtime: it has {size} bytes")
    refuse(whole[:-1], "is damaged: it says")
    refuse(file.read_bytes() + bytes(300), "is no image of torch_ext.runtime$")
    name = encoder.isa.encode()
    refuse(whole.replace(name + b"\0", b"z80".ljust(len(name), b"\0") + b"\0", 1), "image was packed for z80")
    for place in (24, 100, 250, len(whole) // 2, len(whole) - 1):
        refuse(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :], "image")
    with pytest.raises(FileNotFoundError, match="cannot open"):
        runtime.Encoder.open_image(tmp_path / "none")
    with pytest.raises(OSError, match="cannot use descriptor 12345: Bad file descriptor"):
        runtime.Encoder.open_image(12345)
    for fd in (-1, 2**31, 2**40, 2**70):
        with pytest.raises(ValueError, match="expected a file descriptor, got"):
            runtime.Encoder.open_image(fd)
    with pytest.raises(FileNotFoundError, match="cannot write beside"):
        encoder.save_image(tmp_path / "none" / "image")
    memory = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.write(memory, whole)
    with pytest.raises(ValueError, match="the shared image is not sealed: its maker could change it"):
        runtime.Encoder.open_image(memory)
    os.close(memory)
    reader, writer = os.pipe()
    with pytest.raises(ValueError, match="is not a regular file"):
        runtime.Encoder.open_image(reader)
    os.close(reader)
    os.close(writer)


# Prints the process's share of its memory, with the weights once mapped and run.
MEMORY = """
import re, sys
from torch_ext import runtime
encoder = runtime.Encoder.open_image(int(sys.argv[1]), threads=1)
encoder.encode(list(range(256)), [0, 256])
print("ready", flush=True)
sys.stdin.readline()
fields = dict(re.findall(r"(\\w+): +(\\d+) kB", open("/proc/self/smaps_rollup").read()))
print(fields["Pss"], fields["Rss"], flush=True)
sys.stdin.readline()
"""


@pytest.mark.anywhere
def test_weights_are_in_memory_once(generator: torch.Generator) -> None:
    """A process that maps them adds no copy of its own: its proportional share is that much below its whole."""
    wide = dataclasses.replace(SPEC, hidden_size=512, intermediate_size=4096, max_positions=256, vocab_size=256)
    tensors = {
        name: runtime.Tensor("F32", shape, np.zeros(shape, np.float32) + np.float32(0.01))
        for name, shape in wide.shapes().items()
    }
    encoder = runtime.Encoder.pack(dataclasses.asdict(wide), tensors, threads=1, shared=True)
    megabytes = encoder.image_bytes / 1024
    assert megabytes > 16 * 1024
    fd = encoder.share()
    command = [sys.executable, "-c", MEMORY, str(fd)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "pass_fds": [fd]}
    with subprocess.Popen(command, **pipes) as one, subprocess.Popen(command, **pipes) as other:
        shares = []
        processes = (one, other)
        try:
            for process in processes:
                assert process.stdout is not None
                assert process.stdout.readline() == "ready\n"
            for process in processes:
                assert process.stdin is not None
                assert process.stdout is not None
                process.stdin.write("\n")
                process.stdin.flush()
                shares.append(list(map(int, process.stdout.readline().split())))
        finally:
            for process in processes:
                process.kill()
    os.close(fd)
    for pss, rss in shares:
        # Mapped by both; here, too, if this process has touched its own mapping.
        assert rss - pss > 0.4 * megabytes, shares


# Prints the process's memory in KB: after a small batch, after a large one, and once that has been given back.
WORKSPACE = """
import json, sys, time
from torch_ext import runtime
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * 4
encoder = runtime.Encoder.open_image(sys.argv[1], threads=2)
def run(texts):
    return bytes(encoder.encode([1] * 64 * texts, range(0, 64 * texts + 1, 64)).pool("mean"))
first = run(2)
before = resident()
run(256)
largest = resident()
encoder.release_workspace()
deadline_s = time.monotonic() + 20
while (after := resident()) > before + (largest - before) // 4 and time.monotonic() < deadline_s:
    time.sleep(0.01)
print(json.dumps([before, largest, after, run(2) == first]))
"""


@pytest.mark.anywhere
def test_workspace_is_given_back_on_every_thread(tmp_path: Path) -> None:
    wide = dataclasses.replace(SPEC, hidden_size=256, intermediate_size=4096, max_positions=64, vocab_size=64)
    tensors = {
        name: runtime.Tensor("F32", shape, np.full(shape, 0.01, np.float32)) for name, shape in wide.shapes().items()
    }
    runtime.Encoder.pack(dataclasses.asdict(wide), tensors).save_image(tmp_path / "image")
    command = [sys.executable, "-c", WORKSPACE, str(tmp_path / "image")]
    before, largest, after, equal = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    assert largest - before > 4096
    assert after < before + (largest - before) / 3
    assert equal


# ---- processes and threads -------------------------------------------------------------------------------------------


def wait_for(child: int) -> int:
    """The exit code of a child that does not hang."""
    deadline = time.monotonic() + 120
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, 9)
            os.waitpid(child, 0)
            pytest.fail("the child hangs")
        time.sleep(0.01)
    return os.waitstatus_to_exitcode(ended[1])


# What Python 3.12 says of every process with threads.
@pytest.mark.anywhere
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("callers", [0, 2])
def test_a_forked_child_encodes(callers: int, encoder: runtime.Encoder) -> None:
    """Whatever other threads are in the middle of when it is forked."""
    ids, bounds = [1] * 20 * 40, list(range(0, 801, 20))
    expected = np.asarray(encoder.encode(ids, bounds).hidden()).tobytes()
    done = threading.Event()

    def call() -> None:
        while not done.is_set():
            encoder.encode(ids, bounds)

    threads = [threading.Thread(target=call) for _ in range(callers)]
    for thread in threads:
        thread.start()
    codes = []
    try:
        for _ in range(5 if callers else 1):
            child = os.fork()
            if child == 0:
                try:
                    same = np.asarray(encoder.encode(ids, bounds).hidden()).tobytes() == expected
                    os._exit(0 if same else 2)
                finally:
                    os._exit(1)
            codes.append(wait_for(child))
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert set(codes) == {0}
    assert np.asarray(encoder.encode(ids, bounds).hidden()).tobytes() == expected


# A process that began with fork ends as any other, with its encoders and results alive.
FORK_AND_EXIT = """
import os, sys
from torch_ext import runtime
encoder = runtime.Encoder.open(sys.argv[1], threads=3)
kept = encoder.encode([1] * 800, list(range(0, 801, 20))).hidden()
child = os.fork()
again = encoder.encode([1] * 800, list(range(0, 801, 20))).hidden()
assert again.tolist() == kept.tolist()
if child:
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.anywhere
def test_processes_end_with_encoders_alive(file: Path) -> None:
    assert run_python(FORK_AND_EXIT, str(file)) == "0\n"


@pytest.mark.anywhere
def test_the_gil_is_released(generator: torch.Generator) -> None:
    spec = dataclasses.replace(SPEC, num_layers=20, max_positions=512)
    weights = {n: runtime.Tensor("F32", tuple(t.shape), t.numpy()) for n, t in make_weights(spec, generator).items()}
    encoder = runtime.Encoder.pack(dataclasses.asdict(spec), weights, threads=1)
    ids, bounds = np.ones(512 * 4, np.int64), np.arange(0, 512 * 4 + 1, 512, dtype=np.int32)
    running, counted = threading.Event(), [0]
    done = threading.Event()

    def count() -> None:
        running.set()
        while not done.is_set():
            counted[0] += 1
            time.sleep(0)  # gives the GIL away

    # Nobody is made to give it away in this time.
    interval = sys.getswitchinterval()
    counter = threading.Thread(target=count)
    counter.start()
    try:
        running.wait()
        sys.setswitchinterval(1000)
        seen = 0
        for _ in range(20):
            before = counted[0]
            encoder.encode(ids, bounds)
            seen = counted[0] - before
            if seen:
                break
    finally:
        sys.setswitchinterval(interval)
        done.set()
        counter.join()
    assert seen > 0


def test_calls_at_once_give_the_same_bits(file: Path, generator: torch.Generator) -> None:
    encoders = [runtime.Encoder.open(file, threads=threads) for threads in (3, 2)]
    batches = [batch(generator, [int(n) for n in torch.randint(1, 21, (60,), generator=generator)]) for _ in range(4)]
    expected = [encoders[0].encode(*b).hidden().tolist() for b in batches]
    wrong: list[int] = []

    def call(index: int) -> None:
        for turn in range(8):
            states = encoders[(index + turn) % 2].encode(*batches[index])
            if states.hidden().tolist() != expected[index]:
                wrong.append(index)

    threads = [threading.Thread(target=call, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.anywhere
def test_an_idle_encoder_takes_no_time(file: Path) -> None:
    program = """
import resource, sys, time
from torch_ext import runtime
encoders = [runtime.Encoder.open(sys.argv[1], threads=4) for _ in range(2)]
for encoder in encoders:
    encoder.encode([1] * 800, list(range(0, 801, 20)))
time.sleep(0.1)
def used():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
before = used()
time.sleep(0.3)
print(used() - before)
"""
    # 6 threads that spin take 0.3 s and more of it, on any number of cores.
    assert float(run_python(program, str(file))) < 0.05


def resident_kib() -> int:
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * resource.getpagesize() // 1024


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.anywhere
def test_opening_and_closing_leaves_nothing_behind(file: Path, tmp_path: Path) -> None:
    runtime.Encoder.open(file).save_image(tmp_path / "image")

    def cycle(turn: int) -> None:
        encoder = (
            runtime.Encoder.open(file, threads=3, shared=turn % 2 == 0)
            if turn % 4
            else runtime.Encoder.open_image(tmp_path / "image", threads=3)
        )
        fd = encoder.share()
        os.close(fd)
        encoder.encode([1] * 800, list(range(0, 801, 20))).pool("mean")
        with pytest.raises(ValueError, match="is no image"):
            runtime.Encoder.open_image(file)

    for turn in range(20):
        cycle(turn)
    threads, files, memory = len(os.listdir("/proc/self/task")), open_files(), resident_kib()
    for turn in range(200):
        cycle(turn)
    gc.collect()
    assert open_files() == files
    # The system lists a thread that has ended, and was joined, for a moment longer.
    deadline = time.monotonic() + 30
    while len(os.listdir("/proc/self/task")) > threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(os.listdir("/proc/self/task")) <= threads
    # An encoder of these takes more than 200 KiB. An emulator keeps what it has translated.
    assert resident_kib() - memory < 8 * 1024 or "QEMU_CPU" in os.environ


@pytest.mark.anywhere
def test_threads_and_cpus_are_options(file: Path) -> None:
    own = sorted(os.sched_getaffinity(0))
    assert 1 <= runtime.default_threads() <= len(own)
    assert runtime.Encoder.open(file).threads == runtime.default_threads()
    assert runtime.Encoder.open(file, cpus=own[:1]).threads == 1
    assert runtime.Encoder.open(file, threads=3, cpus=own, pin=True).threads == 3
    assert set(os.sched_getaffinity(0)) == set(own)
    with pytest.raises(ValueError, match="expected CPUs that this process may run on, got 4000"):
        runtime.Encoder.open(file, threads=2, cpus=[4000])
    for cpu in (-1, 2**31, 2**70):
        with pytest.raises(ValueError, match="expected numbers of CPUs, got"):
            runtime.Encoder.open(file, cpus=[cpu])
    for cpus in (0, "01", [0.5]):
        with pytest.raises(TypeError, match="expected cpus as numbers of CPUs, got"):
            runtime.Encoder.open(file, cpus=cpus)  # type: ignore[arg-type]
    for threads in (0, -1):
        with pytest.raises(ValueError, match=f"expected threads of at least 1, got {threads}"):
            runtime.Encoder.open(file, threads=threads)
    with pytest.raises(ValueError, match="expected threads of at most 32 bits"):
        runtime.Encoder.open(file, threads=2**70)
    with pytest.raises(TypeError, match="expected threads as an integer, got str"):
        runtime.Encoder.open(file, threads="2")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected threads of at most 4096, got 5000"):
        runtime.Encoder.open(file, threads=5000)


def test_what_it_prints(encoder: runtime.Encoder) -> None:
    assert repr(encoder) == (
        f"runtime.Encoder(bert, dtype=bf16, isa={encoder.isa}, task=fill-mask, hidden_size=32, num_layers=2, threads=2)"
    )
    assert set(runtime.__all__) == {
        *("Array", "Encoder", "Pooling", "States", "Tensor", "default_threads", "finite_rows", "isa_report", "json_row")
    }


# A program that embeds a text: what it has imported, and the libraries that are in its memory.
ALONE = """
import json, re, sys
from torch_ext import runtime
vector = runtime.Encoder.open(sys.argv[1]).encode([1, 2], [0, 2]).pool("mean").tolist()
modules = sorted({name.partition(".")[0] for name in sys.modules})
libraries = re.findall(r"/([^/\\n]+\\.so)\\b", open("/proc/self/maps").read())
print(json.dumps([len(vector), modules, sorted(set(libraries))]))
"""


@pytest.mark.anywhere
def test_it_needs_nothing_but_python(file: Path) -> None:
    vectors, modules, libraries = json.loads(run_python(ALONE, str(file)))
    assert vectors == 1
    assert not {"torch", "numpy", "transformers", "safetensors", "tokenizers", "onnxruntime"} & set(modules)
    assert "libtorch_ext_runtime.so" in libraries
    assert not [
        name
        for name in libraries
        if any(word in name for word in ("torch_cpu", "torch_python", "gomp", "iomp", "blas"))
    ]
