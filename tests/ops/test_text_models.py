"""Encoders of texts in models of other kinds: proteins (ESM), images (CLIP, SigLIP), adapters inside (Jina v3)."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from tests.ops import reference
from tests.ops.test_encoder import run_plain
from torch_ext import Encoder, Head, runtime

pytestmark = [
    pytest.mark.needs_transformers,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers"),
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
]

LENGTHS = [9, 1, 30, 17]
SIZES = {"vocab_size": 100, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
SIZES = {**SIZES, "intermediate_size": 80, "max_position_embeddings": 40}
MASK, END = 5, 99


@pytest.fixture(scope="module")
def transformers() -> Any:
    return pytest.importorskip("transformers")


def random_model(model: nn.Module) -> nn.Module:
    """With random norms and biases, too."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif parameter.dim() == 2:
                parameter.normal_().mul_(1.5 * parameter.shape[1] ** -0.5)
    return model.eval()


def batch(generator: torch.Generator, lengths: list[int]) -> tuple[Tensor, Tensor]:
    ids = torch.randint(10, 99, (sum(lengths),), generator=generator)
    bounds = reference.cu_seqlens(lengths)
    ids[bounds[1:].long() - 1] = END
    return ids, bounds


def outputs(model: nn.Module, ids: Tensor, bounds: Tensor) -> list[Any]:
    with torch.inference_mode():
        return [model(ids[begin:end].unsqueeze(0)) for begin, end in itertools.pairwise(bounds.tolist())]


def cosines(found: Tensor, expected: Tensor) -> Tensor:
    return F.cosine_similarity(found.double(), expected.double(), dim=-1)


def check(model: nn.Module, folder: Path, ids: Tensor, bounds: Tensor, expected: Tensor) -> None:
    """Compare with what a model gives, out of the object and out of the folder, in every dtype."""
    exact = Encoder.from_transformers(model, "fp32")
    torch.testing.assert_close(exact(ids, bounds), expected, rtol=1e-4, atol=1e-4)
    model.save_pretrained(folder)
    for dtype, bound in (("bf16", 0.9995), ("int8", 0.99)):
        encoder = Encoder.from_transformers(model, dtype)
        assert cosines(encoder(ids, bounds), expected).min() > bound
        assert torch.equal(Encoder.from_pretrained(folder, dtype)(ids, bounds), encoder(ids, bounds))
    alone = runtime.Encoder.from_pretrained(folder, "fp32", None)
    assert alone.spec == vars(exact.spec)
    hidden = torch.from_dlpack(alone.encode(ids, bounds).hidden())
    torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-4)


ESM = {**SIZES, "pad_token_id": 1, "mask_token_id": MASK, "token_dropout": True, "emb_layer_norm_before": False}


@pytest.mark.parametrize(
    "options",
    [
        {"position_embedding_type": "rotary"},
        {"position_embedding_type": "absolute"},
        {"position_embedding_type": "rotary", "token_dropout": False},
    ],
    ids=str,
)
def test_esm(options: dict[str, Any], transformers: Any, generator: torch.Generator, tmp_path: Path) -> None:
    """With masks in some texts, all of which change the scale of the other words."""
    model = random_model(transformers.EsmModel(transformers.EsmConfig(**{**ESM, **options})))
    ids, bounds = batch(generator, LENGTHS)
    ids[0], ids[12:20] = MASK, MASK
    check(model, tmp_path, ids, bounds, torch.cat([each.last_hidden_state[0] for each in outputs(model, ids, bounds)]))


def test_masked_words_of_esm(transformers: Any, generator: torch.Generator, tmp_path: Path) -> None:
    config = transformers.EsmConfig(**ESM, position_embedding_type="rotary")
    model = random_model(transformers.EsmForMaskedLM(config))
    ids, bounds = batch(generator, LENGTHS)
    ids[15] = MASK
    expected = torch.cat([each.logits[0] for each in outputs(model, ids, bounds)])
    hidden = Encoder.from_transformers(model, "fp32")(ids, bounds)
    torch.testing.assert_close(Head.from_transformers(model, "fp32")(hidden), expected, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    states = runtime.Encoder.from_pretrained(tmp_path, "fp32").encode(ids, bounds)
    torch.testing.assert_close(torch.from_dlpack(states.token_logits()), expected, rtol=1e-4, atol=1e-4)


def test_esm_that_is_not_supported(transformers: Any) -> None:
    model = transformers.EsmModel(transformers.EsmConfig(**{**ESM, "emb_layer_norm_before": True}))
    with pytest.raises(ValueError, match="expected emb_layer_norm_before=None or False, got True"):
        Encoder.from_transformers(model)


def of_images(transformers: Any, kind: str, text: dict[str, Any]) -> nn.Module:
    """A model of texts and images."""
    vision = {**SIZES, "num_hidden_layers": 1, "image_size": 16, "patch_size": 8}
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=vision)
    config.projection_dim = 20
    return random_model(getattr(transformers, f"{kind}Model")(config))


def check_features(model: nn.Module, folder: Path, ids: Tensor, bounds: Tensor, expected: Tensor) -> None:
    """The last token's state through the projection, by torch and by the runtime."""
    ends = bounds[1:].long() - 1
    head = Head.from_transformers(model, "fp32")
    assert head.spec.task == "feature-extraction"
    vectors = head(Encoder.from_transformers(model, "fp32")(ids, bounds), ends)
    torch.testing.assert_close(vectors, expected, rtol=1e-4, atol=1e-4)
    for dtype, least in (("fp32", 0.99999), ("bf16", 0.999)):
        encoder = runtime.Encoder.from_pretrained(folder, dtype)  # type: ignore[arg-type]
        assert encoder.task == "feature-extraction"
        found = torch.from_dlpack(encoder.encode(ids, bounds).pool("lasttoken"))
        assert cosines(found, expected).min() > least


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_clip(activation: str, transformers: Any, generator: torch.Generator, tmp_path: Path) -> None:
    text = {**SIZES, "hidden_act": activation, "eos_token_id": END, "projection_dim": 20}
    model = random_model(transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**text)))
    ids, bounds = batch(generator, LENGTHS)
    expected = outputs(model, ids, bounds)
    check(model, tmp_path, ids, bounds, torch.cat([each.last_hidden_state[0] for each in expected]))
    check_features(model, tmp_path, ids, bounds, torch.cat([each.text_embeds for each in expected]))


def test_siglip(transformers: Any, generator: torch.Generator, tmp_path: Path) -> None:
    """The projection takes the last token, which is padding for all but the longest texts."""
    model = random_model(transformers.SiglipTextModel(transformers.SiglipTextConfig(**SIZES, projection_size=20)))
    ids, bounds = batch(generator, [40, 40, 40])
    ids[50:80] = 1
    expected = outputs(model, ids, bounds)
    check(model, tmp_path, ids, bounds, torch.cat([each.last_hidden_state[0] for each in expected]))
    check_features(model, tmp_path, ids, bounds, torch.cat([each.pooler_output for each in expected]))


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_the_texts_of_a_model_with_images(
    kind: str, transformers: Any, generator: torch.Generator, tmp_path: Path
) -> None:
    model = of_images(transformers, kind, {**SIZES, "eos_token_id": END, "projection_size": 20})
    ids, bounds = batch(generator, [40, 40])
    with torch.inference_mode():
        found = model.get_text_features(ids.view(2, 40))  # type: ignore[operator]
    expected = found if isinstance(found, Tensor) else found.pooler_output
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    check_features(model, tmp_path, ids, bounds, expected)


TASKS = ["retrieval.query", "text-matching"]
JINA = {
    **SIZES,
    "model_type": "xlm-roberta",
    "architectures": ["XLMRobertaModel"],
    "position_embedding_type": "rotary",
    "rotary_emb_base": 500.0,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
    "hidden_act": "gelu",
    "pad_token_id": 1,
    "lora_adaptations": TASKS,
    "lora_alpha": 2,
    "lora_rank": 4,
}
JINA_LAYER = {
    "mixer.Wqkv": ("attention.qkv", (144, 48)),
    "mixer.out_proj": ("attention.out", (48, 48)),
    "mlp.fc1": ("ffn.up", (80, 48)),
    "mlp.fc2": ("ffn.down", (48, 80)),
}


def jina(generator: torch.Generator) -> tuple[dict[str, Tensor], dict[str | None, dict[str, Tensor]]]:
    """Random weights as the model's own code names them; and, by adapter, as a specification names the merged ones."""

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * shape[-1] ** -0.5

    stored: dict[str, Tensor] = {}
    merged: dict[str | None, dict[str, Tensor]] = {task: {} for task in (None, *TASKS)}

    def adapted(name: str, to: str, rows: int, columns: int, is_table: bool) -> None:
        original = rand(rows, columns)
        a, b = (rand(2, rows, 4), rand(2, 4, columns)) if is_table else (rand(2, 4, columns), rand(2, rows, 4))
        stored[f"{name}.parametrizations.weight.original"] = original
        stored[f"{name}.parametrizations.weight.0.lora_A"] = a
        stored[f"{name}.parametrizations.weight.0.lora_B"] = b
        merged[None][to] = original
        for index, task in enumerate(TASKS):
            merged[task][to] = original + (a[index] @ b[index] if is_table else b[index] @ a[index]) * 2 / 4

    def plain(name: str, to: str, tensor: Tensor) -> None:
        stored[name] = tensor
        for weights in merged.values():
            weights[to] = tensor

    def norm(name: str, to: str) -> None:
        plain(f"{name}.weight", f"{to}.weight", 1 + rand(48))
        plain(f"{name}.bias", f"{to}.bias", rand(48))

    adapted("roberta.embeddings.word_embeddings", "embeddings.word", 100, 48, True)
    adapted("roberta.embeddings.token_type_embeddings", "embeddings.token_type", 1, 48, True)
    norm("roberta.emb_ln", "embeddings.norm")
    for index in range(3):
        prefix = f"roberta.encoder.layers.{index}"
        for name, (to, shape) in JINA_LAYER.items():
            adapted(f"{prefix}.{name}", f"layers.{index}.{to}.weight", *shape, False)
            plain(f"{prefix}.{name}.bias", f"layers.{index}.{to}.bias", rand(shape[0]))
        norm(f"{prefix}.norm1", f"layers.{index}.attention.norm")
        norm(f"{prefix}.norm2", f"layers.{index}.ffn.norm")
    adapted("roberta.pooler.dense", "pooler", 48, 48, False)
    plain("roberta.pooler.dense.bias", "pooler.bias", rand(48))
    return stored, merged


class Remote(nn.Module):
    """A model whose code is in its own folder: modules with the names of its weights."""

    base_model_prefix = "roberta"

    def __init__(self, config: dict[str, Any], weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.config = type("Config", (), config)()
        for name, tensor in weights.items():
            module: nn.Module = self
            *path, last = name.split(".")
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module._modules[part]  # type: ignore[assignment]
            module.register_parameter(last, nn.Parameter(tensor))


@pytest.mark.parametrize("task", [None, *TASKS])
def test_adapters_of_jina(task: str | None, generator: torch.Generator, tmp_path: Path) -> None:
    stored, merged = jina(generator)
    ids, bounds = batch(generator, LENGTHS)
    model = Remote(JINA, stored)
    exact = Encoder.from_transformers(model, "fp32", adapter=task)
    assert exact.spec.rotary_theta == 500
    assert not exact.spec.absolute_positions
    expected = run_plain(exact.spec, merged[task], ids, bounds, torch.zeros_like(ids))
    torch.testing.assert_close(exact(ids, bounds).double(), expected, rtol=1e-4, atol=1e-4)
    (tmp_path / "config.json").write_text(json.dumps(JINA), encoding="utf-8")
    for dtype in (torch.float32, torch.bfloat16):
        save_file({name: tensor.to(dtype) for name, tensor in stored.items()}, tmp_path / "model.safetensors")
        least = 0.9995 if dtype == torch.float32 else 0.999  # of a file that is rounded itself
        encoder = Encoder.from_pretrained(tmp_path, adapter=task)
        assert cosines(encoder(ids, bounds), expected).min() > least
        alone = runtime.Encoder.from_pretrained(tmp_path, adapter=task)
        found = torch.from_dlpack(alone.encode(ids, bounds).hidden())
        assert cosines(found, encoder(ids, bounds).float()).min() > 0.99999
    assert cosines(Encoder.from_pretrained(tmp_path, "int8", adapter=task)(ids, bounds), expected).min() > 0.99


def test_adapters_that_are_not_there(generator: torch.Generator, tmp_path: Path) -> None:
    stored, _ = jina(generator)
    (tmp_path / "config.json").write_text(json.dumps(JINA), encoding="utf-8")
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="unknown adapter 'poetry'; known: retrieval"):
        Encoder.from_pretrained(tmp_path, adapter="poetry")
    with pytest.raises(ValueError, match="unknown adapter 'poetry'; known: retrieval"):
        Encoder.from_transformers(Remote(JINA, stored), adapter="poetry")
    (tmp_path / "config.json").write_text(json.dumps({**JINA, "lora_adaptations": None}), encoding="utf-8")
    with pytest.raises(ValueError, match="expected a model with adapters for adapter='text-matching'"):
        Encoder.from_pretrained(tmp_path, adapter="text-matching")
    del stored["roberta.encoder.layers.1.mlp.fc1.parametrizations.weight.0.lora_B"]
    save_file(stored, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(JINA), encoding="utf-8")
    with pytest.raises(ValueError, match=r"expected .*fc1.*lora_A and .*lora_B beside"):
        Encoder.from_pretrained(tmp_path, adapter="text-matching")
