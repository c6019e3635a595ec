"""Exports of small random models and of a real one: what is written is right, measured, and true."""

from __future__ import annotations

import hashlib
import json
import platform
import re
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from deploy.bundle import DEFAULT_VARIANTS, VARIANTS, Machine, load_manifest
from deploy.engines.open import load_engine
from deploy.export.calibration import calibration_texts
from deploy.export.cli import main
from deploy.extras import python_command
from deploy.folder.describe import describe_folder
from deploy.machine import cpu_name, machine, usable_cpus
from deploy.onnx_session import kernels, session_options
from deploy.server.service.tokens import TextTokenizer
from deploy.tasks.feature_extraction import EmbedOptions
from deploy.texts import sample
from torch_ext import Encoder, Head, doctor, isa_report, sensitivity

TEXTS = ["A short one.", "Return the number of items, and raise ValueError if there are none of them at all.", "x"]
TASKS = {
    "feature-extraction": transformers.AutoModel,
    "text-classification": transformers.AutoModelForSequenceClassification,
    "fill-mask": transformers.AutoModelForMaskedLM,
}
QUICK = ["--max-texts", "24", "--speed-seconds", "0", "--quiet"]


FLIPPED_STEPS_BOUND = 0.04
"""How far ONNX Runtime may be from exact arithmetic on the same int8 file, on any CPU.

Integers are the same; floats differ in the last digits, by which a value next to the edge of a step falls on its other
side. A step is 1/255 of 7.6 standard deviations (of some 1,300 normal values), and one of 64 inputs of a sum: 0.4 % of
what comes out, 1 % where the weight is large. Four of those. Products that saturate are wrong by 10 to 40 %.
"""

ONNX_INT8_BOUND = 0.1
"""How far the int8 file may be from fp32, with the random weights of these models.

The input's steps, 7.6 standard deviations / 255, and the weights', 2.9 / 127 (of 64 normal values), cost a product
their root of mean squares over sqrt(12): 1.1 %. Ten products follow one another: 3.4 %. The largest of a thousand such
errors is 3.5 times as large, and the largest value, to which it is compared, 2.6 to 5 times the usual one: under 5 %;
logits of two classes have no such largest value: 6 %. The rest is `FLIPPED_STEPS_BOUND`.
"""


Run = Callable[[list[int]], np.ndarray]
"""Hidden states [tokens, width] of one text, class logits, or logits at every token."""


def reference(model: Path, task: str) -> Run:
    """The model in transformers."""
    loaded = TASKS[task].from_pretrained(model).eval()

    def run(ids: list[int]) -> np.ndarray:
        with torch.inference_mode():
            output = loaded(input_ids=torch.tensor([ids]))
        return (output.last_hidden_state if task == "feature-extraction" else output.logits)[0].numpy()

    return run


def onnx_feeds(ids: list[int]) -> dict[str, np.ndarray]:
    ones = np.ones((1, len(ids)), np.int64)
    return {"input_ids": np.array([ids]), "attention_mask": ones, "token_type_ids": 0 * ones}


def onnx_runtime(path: Path) -> Run:
    """An ONNX model as the server would run it, on one thread: more would be in the way of torch's."""
    session = onnxruntime.InferenceSession(str(path), session_options(1), providers=["CPUExecutionProvider"])
    names = {item.name for item in session.get_inputs()}
    return lambda ids: session.run(None, {name: onnx_feeds(ids)[name] for name in names})[0][0]


def exact_onnx(path: Path) -> Run:
    """The same by ONNX's reference implementation, in numpy: integers are added in 32 bits."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    model = onnx.load(path)
    model.opset_import[0].version = max(19, model.opset_import[0].version)  # Before, it has no DequantizeLinear.
    evaluator = ReferenceEvaluator(model)
    return lambda ids: evaluator.run(None, {name: onnx_feeds(ids)[name] for name in evaluator.input_names})[0][0]


def torch_ext_encoder(path: Path, dtype: Any, task: str) -> Run:
    """An encoder file of a bundle, and its head."""
    encoder = Encoder.load(str(path), dtype=dtype)
    head = None if task == "feature-extraction" else Head.load(str(path), dtype=dtype)

    def run(ids: list[int]) -> np.ndarray:
        with torch.inference_mode():
            hidden = encoder(torch.tensor(ids), torch.tensor([0, len(ids)], dtype=torch.int32))
            if head is None:
                assert task == "feature-extraction"
                return hidden.float().numpy()
            logits = head(hidden, torch.arange(len(ids) if task == "fill-mask" else 1))
        return logits.numpy() if task == "fill-mask" else logits.numpy()[0]

    return run


def error(right: np.ndarray, got: np.ndarray) -> float:
    """Largest difference, relative to the largest value if that is above 1; logits of a fresh head are all near 0."""
    assert right.shape == got.shape
    return float(np.abs(right - got).max() / max(1.0, np.abs(right).max()))


FIRST = {
    ("bert", "feature-extraction"),
    ("roberta", "fill-mask"),
    ("distilbert", "text-classification"),
    ("electra", "feature-extraction"),
}
"""Every task and every architecture once; the other pairs of them take a minute."""


@pytest.mark.parametrize(
    ("model_type", "task"),
    [
        pytest.param(model_type, task, marks=() if (model_type, task) in FIRST else pytest.mark.long)
        for model_type in ("bert", "roberta", "distilbert", "electra")
        for task in TASKS
    ],
)
def test_every_task_of_every_architecture(
    model_type: str, task: str, tiny_model: Callable[..., Path], tiny_bundle: Callable[[str, str], Path]
) -> None:
    model, bundle = tiny_model(model_type, task), tiny_bundle(model_type, task)
    manifest = load_manifest(bundle, verify=True)
    assert list(manifest.variants) == list(DEFAULT_VARIANTS)
    assert manifest.task == task
    assert manifest.hidden_size == 64
    assert manifest.max_tokens == (64 if model_type == "roberta" else 66)
    assert manifest.model.architecture.lower().startswith(model_type)
    assert (manifest.pooling is not None) == (task == "feature-extraction")
    assert manifest.labels == (("LABEL_0", "LABEL_1") if task == "text-classification" else None)
    assert manifest.problem_type == ("single_label_classification" if task == "text-classification" else None)
    assert manifest.special_tokens["pad"].id == (1 if model_type == "roberta" else 0)  # type: ignore[union-attr]
    assert manifest.special_tokens["mask"].token == ("<mask>" if model_type == "roberta" else "[MASK]")  # type: ignore[union-attr]

    # Not with the exporter's own engines: files as anybody would load them, one text after the other.
    tokenizer = Tokenizer.from_file(str(manifest.tokenizer_path))
    bounds = {
        "torch_ext-bf16": 0.03,
        "torch_ext-int8": 0.06,
        "onnx-int8": ONNX_INT8_BOUND,
        "onnx-fp32": 1e-5,
        "torch_ext-fp32": 1e-5,
    }
    runs = {
        name: onnx_runtime(bundle / kind.file)
        if kind.engine == "onnxruntime"
        else torch_ext_encoder(bundle / kind.file, kind.dtype, task)
        for name, kind in VARIANTS.items()
        if name in DEFAULT_VARIANTS
    }
    assert runs.keys() == bounds.keys()
    right, exact = reference(model, task), exact_onnx(bundle / VARIANTS["onnx-int8"].file)
    theirs = transformers.AutoTokenizer.from_pretrained(model)
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        assert ids == theirs(text)["input_ids"]
        expected, got = right(ids), {name: run(ids) for name, run in runs.items()}
        for name, bound in bounds.items():
            assert error(expected, got[name]) < bound, (name, text)
        assert error(exact(ids), got["onnx-int8"]) < FLIPPED_STEPS_BOUND, text


def test_the_manifest_is_true(tiny_bundle: Callable[..., Path], tiny_model: Callable[..., Path]) -> None:
    bundle = tiny_bundle()
    value = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    here = {path.name for path in bundle.iterdir()}
    assert here == {*value["files"], "manifest.json"}
    assert here == {
        "manifest.json",
        "report.html",
        "tokenizer.json",
        "config.json",
        *(VARIANTS[name].file for name in DEFAULT_VARIANTS),
    }
    for name, entry in value["files"].items():
        content = (bundle / name).read_bytes()
        assert entry == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    for name, variant in value["variants"].items():
        assert variant["bytes"] == (bundle / variant["file"]).stat().st_size
        assert variant["accuracy"]["texts"] == 24 == value["verification"]["texts"]
        assert variant["accuracy"]["mean"] >= variant["accuracy"]["min"] >= -1
        assert variant["speed"] is None, name
        kind = VARIANTS[name]
        on_onnx = kind.engine == "onnxruntime"
        assert variant["kernels"] == (kernels(kind.dtype) if on_onnx else isa_report()["isa"])
    assert load_manifest(bundle).machine == machine()
    assert value["machine"]["architecture"] == platform.machine()
    assert (bundle / "config.json").read_bytes() == (tiny_model() / "config.json").read_bytes()
    assert value["created_with"]["transformers"] == transformers.__version__
    assert value["created_with"]["torch"] == torch.__version__
    assert value["created_with"]["onnxruntime"] == onnxruntime.__version__
    # Others than the owner can read it: a server runs as somebody else.
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in bundle.iterdir())
    assert bundle.stat().st_mode & 0o555 == 0o555


X86 = "model name\t: AMD EPYC 7571\nflags\t\t: fpu sse4_2 fma avx avx2\nmodel name\t: other\nflags\t\t: amx_int8\n"
ARM = "BogoMIPS\t: 2\nFeatures\t: fp asimd asimddp sve i8mm\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n"


@pytest.mark.parametrize(
    ("cpuinfo", "cpu", "instruction_sets"),
    [
        (X86, "AMD EPYC 7571", ("avx2", "fma")),
        (ARM, "Neoverse V1 (Graviton3)", ("asimd", "asimddp", "i8mm", "sve")),
        ("", f"unknown {platform.machine()} CPU", ()),
    ],
)
def test_machines_are_described(cpuinfo: str, cpu: str, instruction_sets: tuple[str, ...]) -> None:
    assert machine(cpuinfo) == Machine(cpu, platform.machine(), instruction_sets)
    assert str(machine(cpuinfo)).startswith(f"{cpu} ({platform.machine()}: ")


def test_machine_is_the_one_that_the_doctor_sees() -> None:
    seen = doctor.Machine()
    assert (cpu_name(), usable_cpus()) == (seen.cpu_name(), seen.usable_cpus())


def test_tokenizer_has_no_truncation_and_no_padding(minilm_bundle: Path) -> None:
    value = json.loads((minilm_bundle / "tokenizer.json").read_text(encoding="utf-8"))
    assert value["truncation"] is None
    assert value["padding"] is None
    assert len(Tokenizer.from_file(str(minilm_bundle / "tokenizer.json")).encode("word " * 1000).ids) == 1002


def test_real_model(minilm_bundle: Path, minilm_model: Path) -> None:
    manifest = load_manifest(minilm_bundle, verify=True)
    assert manifest.model.name == "all-MiniLM-L6-v2"
    assert (manifest.hidden_size, manifest.max_tokens) == (384, 256)
    assert manifest.pooling is not None
    assert (manifest.pooling.mode, manifest.pooling.normalize) == ("mean", True)
    assert manifest.pooling.source == "1_Pooling/config.json"
    for name, bounds in {
        "torch_ext-bf16": (0.9999, 0.9995),
        "torch_ext-int8": (0.996, 0.99),
        "onnx-int8": (0.985, 0.95),
        "onnx-fp32": (0.99999, 0.99999),
        "torch_ext-fp32": (0.99999, 0.99999),
    }.items():
        variant = manifest.variant(name)
        assert variant.accuracy.mean >= bounds[0], name
        assert variant.accuracy.min >= bounds[1], name
        assert variant.speed is not None
        assert variant.speed.texts_per_s > 0  # A machine may be busy.
        assert variant.speed.threads >= 1
    sizes = {name: variant.bytes for name, variant in manifest.variants.items()}
    assert sizes["onnx-int8"] < 0.27 * sizes["onnx-fp32"]
    assert sizes["torch_ext-bf16"] < 0.51 * sizes["torch_ext-fp32"]
    # Tables in bf16, which is half of MiniLM.
    assert sizes["torch_ext-int8"] < 0.39 * sizes["torch_ext-fp32"]
    assert manifest.variant("torch_ext-int8").accuracy.details["layers_in_bf16"] == 0
    assert manifest.variant("torch_ext-int8").quantization["kept_bf16"] == []
    assert "layers_in_fp32" in manifest.variant("onnx-int8").accuracy.details
    assert manifest.variant("onnx-int8").accuracy.details["layers_in_fp32"] == 0


OTHER_TEXTS = [
    *("", " \t\n", "a", "!", "quota", "42", "Donaudampfschifffahrt"),
    *("你好 世界", "机器学习模型在服务器上运行得很快。今天天气很好。我们去公园散步吧。", "日本語も", "مرحبا بالعالم"),
    *("🙂", "🚀🔥👩‍👩‍👧‍👦 launch day 🎉", "naïve café — Ångström", "e\u0301", "ПРИВЕТ мир"),
    *("def f(x):\n    return x ** 2\n", "https://example.org/a/b?c=d&e=f", "word " * 400),
]
"""What the export does not verify on: it has docstrings."""


@pytest.mark.long
def test_the_real_model_on_other_texts(minilm_bundle: Path, minilm_model: Path) -> None:
    """The server's tokenizer and engines beside sentence-transformers; bounds are those that users are promised."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Deprecations inside it.
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(str(minilm_model), device="cpu")
    documents = sample(400, seed=7)
    texts = [*OTHER_TEXTS, *documents[:8], max(documents, key=len)]
    expected = np.float64(model.encode(texts, batch_size=8, show_progress_bar=False))
    manifest = load_manifest(minilm_bundle, verify=False)
    tokenizer = TextTokenizer.from_manifest(manifest)
    ids = tokenizer.encode(texts, True)
    assert max(map(len, ids)) == manifest.max_tokens

    def embed(name: str, groups: list[list[int]]) -> np.ndarray:
        engine, _ = load_engine(manifest, manifest.variant(name), 1)
        rows = np.empty((len(texts), manifest.hidden_size))
        for group in groups:
            rows[group] = engine.run([ids[index] for index in group], [EmbedOptions(True)] * len(group))
        return rows

    together, alone = [list(range(len(texts)))], [[index] for index in range(len(texts))]
    # An engine of torch turns on inference mode for its thread, for good.
    with ThreadPoolExecutor(1) as thread:
        for name, variant in manifest.variants.items():
            for groups in (together, alone) if variant.dtype == "int8" else (together,):
                got = thread.submit(embed, name, groups).result()
                np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-5)
                cosines = (got * expected).sum(axis=1)
                assert cosines.mean() >= variant.accuracy.bound["mean"], name
                # onnx-int8 promises a mean only.
                least = variant.accuracy.bound.get("min", 0.95)
                assert cosines.min() >= least, (name, texts[int(cosines.argmin())])


def test_int8_is_made_for_arm(minilm_bundle: Path) -> None:
    """u8 activations, s8 weights with one scale per channel, and no product of activations in int8."""
    import onnx

    graph = onnx.load(minilm_bundle / "model_int8.onnx").graph
    weights = {item.name: item for item in graph.initializer}
    products = [node for node in graph.node if node.op_type == "MatMulInteger"]
    assert len(products) == 36
    for node in products:
        assert weights[node.input[1]].data_type == onnx.TensorProto.INT8
    scales = [item for name, item in weights.items() if name.endswith("_scale") and len(item.dims) == 1]
    assert len(scales) >= 36
    assert {item.dims[0] for item in scales} >= {384, 1536}
    assert sum(node.op_type == "MatMul" for node in graph.node) == 12


@pytest.mark.long  # Like that of bf16.
def test_int8_keeps_sensitive_layers_in_fp32(
    tiny_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Large channels take all steps of the quantizer."""
    folder = outlier_model(tiny_model(), tmp_path / "model")
    plain = load_manifest_of(tiny_model(), tmp_path / "plain", "--variants", "onnx-int8")
    bound = str(plain.variant("onnx-int8").accuracy.mean - 5e-4)
    options = ["--variants", "onnx-int8", "--bound", f"onnx-int8.mean={bound}"]
    manifest = load_manifest_of(folder, tmp_path / "out", *options)
    accuracy = manifest.variant("onnx-int8").accuracy
    assert 2 <= accuracy.details["layers_in_fp32"] < accuracy.details["layers"]
    assert accuracy.mean >= float(bound) == accuracy.bound["mean"]
    import onnx

    graph = onnx.load(manifest.root / "model_int8.onnx").graph
    kept = [node.name for node in graph.node if node.op_type == "MatMul" and "/self/" not in node.name]
    assert sum("attention/output" in name for name in kept) == 2


def outlier_model(model: Path, folder: Path) -> Path:
    """A copy of a model of BERT's kind with channels 250 times larger than the others; fp32 does not mind.

    There are more of them than int8 keeps apart in a row.
    """
    shutil.copytree(model, folder)
    loaded = transformers.AutoModel.from_pretrained(folder)
    with torch.no_grad():
        for layer in loaded.encoder.layer:
            layer.attention.self.value.weight[2:7] *= 250
            layer.attention.self.value.bias[2:7] *= 250
            layer.attention.output.dense.weight[:, 2:7] /= 250
    loaded.save_pretrained(folder)
    return folder


def test_int8_keeps_sensitive_layers_in_bf16(
    tiny_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Attention's output has large channels in each row: the layers that read it are what int8 damages."""
    folder = outlier_model(tiny_model(), tmp_path / "model")
    options = ["--max-texts", "24", "--speed-seconds", "0", "--variants", "torch_ext-int8"]
    assert main([str(folder), "-o", str(tmp_path / "out"), *options]) == 0
    printed = capsys.readouterr().err
    assert re.search(r"write torch_ext-int8 \.\.\. [12] of 8 linear layers in bf16", printed)
    assert re.search(r"layer +damage alone  kept\nlayers\.[01]\.attention\.out +0\.\d+  bf16\n", printed)
    variant = load_manifest(tmp_path / "out", verify=True).variant("torch_ext-int8")
    quantization = variant.quantization
    assert set(quantization["kept_bf16"]) <= {"layers.0.attention.out", "layers.1.attention.out"}
    assert variant.accuracy.details["layers_in_bf16"] == len(quantization["kept_bf16"])
    assert variant.accuracy.details["layers"] == 8 == len(quantization["layers"])
    assert variant.accuracy.min >= 0.99 > quantization["int8"]["min"]
    encoder = Encoder.load(tmp_path / "out" / variant.file, "int8")
    assert set(encoder.kept_bf16) == set(quantization["kept_bf16"])

    # Less is asked for than the bounds are: less is kept; more than bf16 can: an error that says so.
    loose = ["--bound", "torch_ext-int8.min=0.5", "--bound", "torch_ext-int8.mean=0.5", "--accuracy", "0.97"]
    less = load_manifest_of(folder, tmp_path / "less", "--variants", "torch_ext-int8", *loose).variant("torch_ext-int8")
    assert 0.97 <= less.accuracy.mean < variant.accuracy.mean
    assert len(less.quantization["kept_bf16"]) < len(quantization["kept_bf16"])
    assert main([str(folder), "-o", str(tmp_path / "most"), *options, "--accuracy", "1"]) == 2
    assert "--accuracy 1: torch_ext-int8: expected a mean cosine of 1, but all" in capsys.readouterr().err
    assert not (tmp_path / "most").exists()


def test_int8_is_compared_with_the_model_itself_and_made_for_other_texts(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No encoder in fp32 is in memory beside the model, and no text is both learnt from and judged by."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    class Watched(sensitivity.Mixtures):
        def __init__(self, model: torch.nn.Module, texts: tuple[torch.Tensor, torch.Tensor]) -> None:
            seen.append(texts)
            super().__init__(model, texts)

    def refused(*_: Any, **__: Any) -> Encoder:
        raise AssertionError("a whole encoder beside the model")

    monkeypatch.setattr(sensitivity, "Mixtures", Watched)
    monkeypatch.setattr(Encoder, "from_transformers", refused)
    load_manifest_of(tiny_model(), tmp_path / "out", "--variants", "torch_ext-int8")
    ((ids, bounds),) = seen
    assert ids.dtype == torch.int64
    assert 0 < int(bounds.diff().max()) <= 96
    verified = sample(24)
    calibrated = calibration_texts(verified)
    assert len(calibrated) == len(set(calibrated)) == len(bounds) - 1
    assert not any(text.startswith(other) for text in verified for other in calibrated if len(other.split()) > 1)


def test_accuracy_of_other_tasks(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """The mean of hidden states counts, and the bounds of the task hold besides."""
    model = tiny_model("distilbert", "fill-mask")
    manifest = load_manifest_of(model, tmp_path / "out", "--variants", "torch_ext-int8", "--accuracy", "0.99998")
    variant = manifest.variant("torch_ext-int8")
    assert 0 < variant.accuracy.details["layers_in_bf16"] < variant.accuracy.details["layers"] == 8
    assert variant.quantization["chosen"]["mean"] >= 0.99998 > variant.quantization["int8"]["mean"]
    assert variant.accuracy.metric == "agreement"


def load_manifest_of(model: Path, target: Path, *options: str) -> Any:
    assert main([str(model), "-o", str(target), *QUICK, *options]) == 0
    return load_manifest(target, verify=True)


def test_chosen_variants_only(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    manifest = load_manifest_of(tiny_model(), tmp_path / "a", "--variants", "onnx-int8, torch_ext-bf16")
    assert list(manifest.variants) == ["torch_ext-bf16", "onnx-int8"]
    assert sorted(path.name for path in manifest.root.iterdir()) == [
        "config.json",
        "encoder_bf16.safetensors",
        "manifest.json",
        "model_int8.onnx",
        "report.html",
        "tokenizer.json",
    ]


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        # AutoModel would have the decoder, too.
        ("t5", {"d_kv": 16, "d_ff": 128}),
        ("deberta-v2", {"relative_attention": True, "position_buckets": 16, "pos_att_type": ["p2c", "c2p"]}),
    ],
)
def test_other_architectures(
    model_type: str, settings: dict[str, Any], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = tiny_model(model_type, **settings)
    manifest = load_manifest_of(model, tmp_path / "a", "--variants", "torch_ext-bf16,torch_ext-fp32")
    assert manifest.variant("torch_ext-fp32").accuracy.min > 0.99999
    assert manifest.variant("torch_ext-bf16").accuracy.mean > 0.999


def test_architectures_that_the_encoder_does_not_run(
    tiny_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model("squeezebert")
    manifest = load_manifest_of(model, tmp_path / "a")
    assert list(manifest.variants) == ["torch-export-bf16", "onnx-int8", "onnx-fp32"]
    assert manifest.variant("onnx-fp32").accuracy.mean > 0.9999
    assert manifest.variant("torch-export-bf16").accuracy.mean > 0.9999
    assert "note: torch_ext does not run squeezebert models" in capsys.readouterr().err
    assert main([str(model), "-o", str(tmp_path / "b"), "--variants", "torch_ext-bf16", *QUICK]) == 2
    error = capsys.readouterr().err
    assert (
        "torch_ext does not run squeezebert models yet; pass --variants torch-export-bf16,onnx-int8,onnx-fp32" in error
    )


def test_layers_that_the_configuration_does_not_count(
    tiny_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(tiny_model(), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["num_hidden_layers"] == 2
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}), encoding="utf-8")
    load_manifest_of(folder, tmp_path / "a", "--variants", "torch_ext-bf16")
    assert "warning: layers: 1 in config.json, 2 in the weights; the last ones are left out" in capsys.readouterr().err


def test_options_that_the_encoder_does_not_run(
    tiny_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An architecture that torch_ext knows, with an option that it does not."""
    manifest = load_manifest_of(tiny_model("bert", position_embedding_type="relative_key"), tmp_path / "a")
    assert list(manifest.variants) == ["torch-export-bf16", "onnx-int8", "onnx-fp32"]
    assert (
        "expected position_embedding_type='absolute', got 'relative_key'"
        in manifest.verification["left_out"]["torch_ext-bf16"]
    )
    assert "torch_ext-bf16 is left out of the bundle" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "metric"),
    [
        ({"num_labels": 1}, "agreement"),
        ({"num_labels": 1, "problem_type": "regression"}, "closeness"),
        ({"num_labels": 4, "problem_type": "multi_label_classification"}, "agreement"),
        ({"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}, "agreement"),
    ],
)
def test_kinds_of_classification(
    settings: dict[str, Any], metric: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = tiny_model("bert", "text-classification", **settings)
    manifest = load_manifest_of(model, tmp_path / "a", "--variants", "torch_ext-bf16,onnx-fp32")
    assert manifest.labels == tuple(settings.get("id2label", {}).values()) or manifest.labels == tuple(
        f"LABEL_{index}" for index in range(settings["num_labels"])
    )
    expected = "regression" if settings.get("num_labels") == 1 else "single_label_classification"
    assert manifest.problem_type == settings.get("problem_type", expected)
    assert {variant.accuracy.metric for variant in manifest.variants.values()} == {metric}


def test_slow_tokenizer_and_lower_case_of_sentence_transformers(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """A vocabulary without tokenizer.json is converted, and what sentence-transformers does before it is built in."""
    folder = shutil.copytree(tiny_model(), tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "do_lower_case": False}), encoding="utf-8")
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 12, "do_lower_case": true}', encoding="utf-8")
    manifest = load_manifest_of(folder, tmp_path / "out", "--variants", "onnx-fp32", "--normalize", "--pooling", "max")
    assert manifest.max_tokens == 12
    assert (manifest.pooling.mode, manifest.pooling.normalize) == ("max", True)
    tokenizer = Tokenizer.from_file(str(manifest.tokenizer_path))
    assert tokenizer.encode("THE VALUE of It").ids == tokenizer.encode("the value of it").ids
    unknown = tokenizer.token_to_id("[UNK]")
    assert unknown not in tokenizer.encode("THE VALUE").ids


@pytest.mark.parametrize(
    ("settings", "given"),
    [
        ({"tokenizer_class": "PreTrainedTokenizerFast"}, True),
        ({"tokenizer_class": "BertTokenizer"}, True),
        ({"tokenizer_class": "TokenizersBackend"}, False),
        ({"model_input_names": ["input_ids", "attention_mask"]}, False),
    ],
)
def test_token_types_are_those_of_the_version_that_saved_the_folder(
    settings: dict[str, Any],
    given: bool,
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Most tokenizers of transformers 5 give none, to models that transformers 4 saved either."""
    folder = shutil.copytree(tiny_model("bert", "text-classification"), tmp_path / "model")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **settings}), encoding="utf-8")
    for cls in (transformers.PreTrainedTokenizerFast, transformers.BertTokenizerFast):
        monkeypatch.setattr(cls, "model_input_names", ["input_ids", "attention_mask"])
    manifest = load_manifest_of(folder, tmp_path / "out", "--variants", "torch_ext-fp32")
    assert manifest.token_types is given
    assert describe_folder(str(folder), None).token_types is given


def test_proteins(tmp_path: Path) -> None:
    """ESM has a slow tokenizer only; transformers 5 saves it without the frequencies that transformers 4 has."""
    vocabulary = ["<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO.-", "<null_1>", "<mask>"]
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    theirs = transformers.EsmTokenizer(str(folder / "vocab.txt"))
    theirs.save_pretrained(folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.EsmConfig(
        vocab_size=len(vocabulary), position_embedding_type="rotary", pad_token_id=1, mask_token_id=31, **sizes
    )
    transformers.EsmModel(config, add_pooling_layer=False).save_pretrained(folder)
    weights = {
        name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if "inv_freq" not in name
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    texts = ["MKTAYIAKQR", "M K <mask> T", "mk T\u4f60M<eos>K", "MKT" * 400, "<null_1>-. x"]
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(texts), encoding="utf-8")
    manifest = load_manifest_of(
        folder, tmp_path / "out", "--variants", "torch_ext-bf16,torch_ext-fp32", "--texts", str(file)
    )
    served = TextTokenizer.from_manifest(manifest)
    found = [row.tolist() for row in served.encode(texts, truncate=True)]
    assert found == theirs(texts, truncation=True, max_length=manifest.max_tokens)["input_ids"]
    assert manifest.variant("torch_ext-fp32").accuracy.min > 0.99999


def test_texts_of_the_user(tiny_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in sample(30)), encoding="utf-8")
    arguments = [str(tiny_model()), "-o", str(tmp_path / "out"), "--texts", str(file), "--max-texts", "10"]
    assert main([*arguments, "--variants", "onnx-fp32", "--speed-seconds", "0.05", "--threads", "1"]) == 0
    manifest = load_manifest(tmp_path / "out")
    assert manifest.verification["texts"] == 10
    assert manifest.verification["source"] == "mine.jsonl"
    speed = manifest.variant("onnx-fp32").speed
    assert speed is not None
    assert (speed.threads, speed.batch) == (1, 10)
    printed = capsys.readouterr()
    assert "note: 10 of 30 texts, evenly spread" in printed.err
    # Steps with sizes and times go to one stream, the result to the other.
    assert "[1/5] load the model and its tokenizer ... 0.1 M parameters, 0.4 MB, " in printed.err
    assert "[5/5] write the manifest ..." in printed.err
    assert "Warning" not in printed.err
    assert "onnx-fp32" in printed.out
    assert f"measured on {manifest.machine}; texts/s: a quick measurement, 1 threads\n" in printed.out
    assert f"  {python_command()} -m deploy serve " in printed.out


def test_pickled_weights_are_read_without_running_them(
    tiny_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(tiny_model(), tmp_path / "model")
    transformers.AutoModel.from_pretrained(folder).save_pretrained(folder, safe_serialization=False)
    (folder / "model.safetensors").unlink()
    arguments = [str(folder), "-o", str(tmp_path / "out"), "--variants", "onnx-fp32", *QUICK[:-1]]
    assert main(arguments) == 0
    assert "pickle read without running code" in capsys.readouterr().err

    class Harmful:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "harm",)

    torch.save({"embeddings": Harmful()}, folder / "pytorch_model.bin")
    assert main([*arguments[:2], str(tmp_path / "other"), *arguments[3:]]) == 2
    assert not (tmp_path / "harm").exists()
    assert "pytorch_model.bin: a pickle that is damaged or holds more than weights" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_code_of_a_model_is_never_run(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model(), tmp_path / "model")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'harm')!r}, 'w')\nraise SystemExit\n", encoding="utf-8")
    for name in ("config.json", "tokenizer_config.json"):
        value = json.loads((folder / name).read_text(encoding="utf-8"))
        remote = dict.fromkeys(("AutoConfig", "AutoModel"), "evil.Thing") | {"AutoTokenizer": ["evil.T", "evil.T"]}
        (folder / name).write_text(json.dumps({**value, "auto_map": remote}), encoding="utf-8")
    load_manifest_of(folder, tmp_path / "out", "--variants", "onnx-fp32")
    assert not (tmp_path / "harm").exists()
