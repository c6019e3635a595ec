"""Folders of sentence-transformers whose embeddings are made in rarer ways, served as they are: its own answers."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parent))

from server_harness import ask

from deploy.bundle import Pooling, Role, TokenVectors, load_manifest
from deploy.export.cli import main
from deploy.folder.describe import describe_folder
from deploy.folder.errors import FolderError
from deploy.server.errors import ApiError
from deploy.server.limits.bounds import Limits
from deploy.server.limits.callers import Caller
from deploy.server.service import structured
from deploy.server.service.tokens import TextTokenizer
from tests.deploy.test_folders import change

ModelMaker = Callable[..., Path]
TEXTS = ["the name of the file", "", "returns the values of all objects, or none"]
LIMITS = Limits(inputs=100, chars=5000, values=1 << 20)
FP32 = "torch_ext-fp32"


def save(folder: Path, target: Path, poolings: tuple[str, ...], dense: int | None = None, **options: Any) -> Any:
    """Saves a model with a Pooling, and returns it; `include_prompt` is of the Pooling, others of the model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sentence_transformers import SentenceTransformer, models

        torch.manual_seed(1)
        pooling = models.Pooling(64, pooling_mode=poolings, include_prompt=options.pop("include_prompt", True))
        modules: list[Any] = [models.Transformer(str(folder)), pooling]
        modules += [] if dense is None else [models.Dense(64 * len(poolings), dense)]
        made = SentenceTransformer(modules=[*modules, models.Normalize()], device="cpu", **options)
        made.save(str(target))
        return made


def embedded(manifest: Any, variant: str = FP32, **options: Any) -> Any:
    return np.asarray(list(ask(manifest, variant, lambda s: s.embed(TEXTS, Caller(), LIMITS, **options)).values))


def test_vectors_of_several_poolings_stand_side_by_side(tiny_model: ModelMaker, tmp_path: Path) -> None:
    modes = ("weightedmean", "cls", "max")
    expected = save(tiny_model(), tmp_path / "model", modes, dense=40).encode(TEXTS)
    folder = str(tmp_path / "model")
    described = describe_folder(folder, None)
    assert described.pooling is not None
    assert described.pooling.mode == "weightedmean+cls+max"
    np.testing.assert_allclose(embedded(described), expected, atol=1e-4)
    variants = "torch_ext-fp32,torch_ext-int8,onnx-fp32"
    options = ["--max-texts", "8", "--speed-seconds", "0", "--quiet", "--variants", variants]
    assert main([folder, "-o", str(tmp_path / "out"), *options]) == 0
    manifest = load_manifest(tmp_path / "out")
    for variant, close in ((FP32, 1e-4), ("onnx-fp32", 1e-4), ("torch_ext-int8", 0.05)):
        np.testing.assert_allclose(embedded(manifest, variant), expected, atol=close)


def test_several_poolings_without_a_stage(tiny_model: ModelMaker, tmp_path: Path) -> None:
    expected = save(tiny_model(), tmp_path / "model", ("cls", "mean")).encode(TEXTS)
    # As older versions wrote it: their order is none of the file's.
    older = {"word_embedding_dimension": 64, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}
    (tmp_path / "model" / "1_Pooling" / "config.json").write_text(json.dumps(older), encoding="utf-8")
    manifest = describe_folder(str(tmp_path / "model"), None)
    assert (manifest.width, manifest.hidden_size) == (128, 64)
    np.testing.assert_allclose(embedded(manifest), expected, atol=1e-4)
    cut = embedded(manifest, dimensions=100)
    np.testing.assert_allclose(cut, expected[:, :100] / np.linalg.norm(expected[:, :100], axis=1)[:, None], atol=1e-4)


@pytest.mark.parametrize("mode", ["mean", "weightedmean", "cls", "max+lasttoken"])
def test_prompts_that_are_not_pooled(mode: str, tiny_model: ModelMaker, tmp_path: Path) -> None:
    prompts = {"query": "find the name of: ", "passage": "x"}
    options = {"include_prompt": False, "prompts": prompts, "default_prompt_name": "query"}
    model = save(tiny_model(), tmp_path / "model", tuple(mode.split("+")), **options)
    manifest = describe_folder(str(tmp_path / "model"), None)
    assert manifest.pooling == Pooling(mode, True, "1_Pooling/config.json", include_prompt=False)
    np.testing.assert_allclose(embedded(manifest), model.encode(TEXTS), atol=1e-4)
    given = embedded(manifest, prompt_name="passage")
    np.testing.assert_allclose(given, model.encode(TEXTS, prompt_name="passage"), atol=1e-4)
    assert Pooling.read(_reader(manifest.pooling.to_json())) == manifest.pooling


def _reader(value: Any) -> Any:
    from deploy.bundle import Reader

    return Reader("here", value)


def test_prompt_of_a_cross_encoder(tiny_model: ModelMaker, tmp_path: Path) -> None:
    """It goes before the first text of a pair."""
    pairs = [("the name", text) for text in TEXTS]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sentence_transformers import CrossEncoder

        folder = tiny_model("bert", "text-classification", num_labels=1)
        prompts = {"find": "the values of all objects: ", "other": ""}
        model = CrossEncoder(str(folder), device="cpu", prompts=prompts, default_prompt_name="find")
        model.save_pretrained(str(tmp_path / "model"))
        expected = model.predict(pairs)
        without = model.predict(pairs, prompt="")
    manifest = describe_folder(str(tmp_path / "model"), None)
    result = ask(manifest, FP32, lambda service: service.classify(pairs, Caller(), LIMITS))
    np.testing.assert_allclose([answer[0]["score"] for answer in result.values], expected, atol=1e-4)
    assert abs(expected - without).max() > 1e-3


TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}[SEP]{% endfor %}"


def chat_model(folder: Path, target: Path, template: str = TEMPLATE) -> Any:
    """Saves a model whose texts go through a chat template, and returns it."""
    base = shutil.copytree(folder, target.with_name("base"))
    (base / "chat_template.jinja").write_text(template, encoding="utf-8")
    return save(base, target, ("mean",), prompts={"query": "find the file", "document": ""})


def test_texts_that_go_through_a_chat_template(tiny_model: ModelMaker, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    model = chat_model(tiny_model(), folder)
    assert "message" in json.loads((folder / "sentence_bert_config.json").read_text())["modality_config"]
    manifest = describe_folder(str(folder), None)
    assert manifest.prompts is not None
    assert manifest.prompts.texts["query"] == "system: find the file[SEP]user: "
    options = ["--max-texts", "8", "--speed-seconds", "0", "--quiet", "--variants", FP32]
    assert main([str(folder), "-o", str(tmp_path / "out"), *options]) == 0
    for each in (manifest, load_manifest(tmp_path / "out")):
        np.testing.assert_allclose(embedded(each), model.encode(TEXTS), atol=1e-4)
        asked = embedded(each, prompt_name="query")
        np.testing.assert_allclose(asked, model.encode(TEXTS, prompt_name="query"), atol=1e-4)


def test_variables_of_a_chat_template(tiny_model: ModelMaker, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    given = {"thinking": True, "add_generation_prompt": True}
    end = "{% if thinking and add_generation_prompt %}[SEP]so{% endif %}"
    chat_model(tiny_model(), folder, TEMPLATE + end)
    plain = describe_folder(str(folder), None)
    change(folder / "sentence_bert_config.json", processing_kwargs={"chat_template": given})
    text = TextTokenizer.from_manifest(describe_folder(str(folder), None)).encode(TEXTS[:1], truncate=True)[0]
    assert len(text) > len(TextTokenizer.from_manifest(plain).encode(TEXTS[:1], truncate=True)[0])
    change(folder / "sentence_bert_config.json", processing_kwargs={"chat_template": {"tools": []}})
    with pytest.raises(FolderError, match="chat_template: tools is not supported"):
        describe_folder(str(folder), None)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[-1]['content'] }} of", "expected that it begins with one of the tokenizer's special tokens"),
        ("{{ messages[0]['content'] | upper }}", "changes texts or repeats them"),
        ("{{ messages[-1]['content'] }}[SEP]{{ messages[0]['role'] }}", "puts prompts behind texts"),
        ("{{ raise_exception('not so') }}", "the chat template fails: not so"),
        ("{{ ''.__class__.__mro__ }}", "the chat template fails"),
    ],
)
def test_chat_templates_that_are_refused(template: str, message: str, tiny_model: ModelMaker, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model(), tmp_path / "model")
    change(folder / "sentence_bert_config.json", modality_config={"message": {"format": "flat"}})
    change(folder / "config_sentence_transformers.json", prompts={"query": "find"})
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    with pytest.raises(FolderError, match=message):
        describe_folder(str(folder), None)


# Vectors of tokens. sentence-transformers makes them from 6 on: here they are made of the parts.

MULTI = "sentence_transformers.multi_vector_encoder.modules.multi_vector_mask.MultiVectorMask"
BASE = "sentence_transformers.base.modules"


def save_multi(folder: Path, target: Path, settings: Any = None, **mask: Any) -> torch.nn.Linear:
    """Writes a MultiVectorEncoder, and returns its linear stage."""
    shutil.copytree(folder, target)
    stream = {"module_input_name": "token_embeddings", "module_output_name": "token_embeddings"}
    torch.manual_seed(1)
    linear = torch.nn.Linear(64, 24, bias=False)
    identity = "torch.nn.modules.linear.Identity"
    change(target / "1_Dense" / "config.json", out_features=24, bias=False, activation_function=identity, **stream)
    save_file({"linear.weight": linear.weight.detach()}, target / "1_Dense" / "model.safetensors")
    change(target / "2_MultiVectorMask" / "config.json", **mask)
    change(target / "3_Normalize" / "config.json", **stream)
    kinds = (f"{BASE}.transformer.Transformer", f"{BASE}.dense.Dense", MULTI, f"{BASE}.normalize.Normalize")
    paths = ("", "1_Dense", "2_MultiVectorMask", "3_Normalize")
    modules = [{"path": path, "type": kind} for path, kind in zip(paths, kinds, strict=True)]
    (target / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    change(target / "sentence_bert_config.json", **(settings or {}))
    prompts = {"query": "of ", "document": "the "}
    change(target / "config_sentence_transformers.json", model_type="MultiVectorEncoder", prompts=prompts)
    return linear


def token_vectors(
    folder: Path,
    linear: torch.nn.Linear,
    prompt: str,
    skipped: tuple[str, ...] = (),
    size: int = 0,
    attend: bool = True,
) -> list[Any]:
    """What transformers makes of the texts; `size` fills them up with mask tokens, or cuts them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers

        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    found = []
    for text in TEXTS:
        cut = {"truncation": True, "max_length": size} if size else {}
        ids = tokenizer(prompt + text, **cut)["input_ids"]
        own = len(ids)
        ids += [tokenizer.mask_token_id] * (size - own)
        mask = (torch.arange(len(ids)) < (len(ids) if attend else own)).long()[None]
        left = torch.tensor([tokenizer.convert_ids_to_tokens(token) not in skipped for token in ids])
        with torch.inference_mode():
            vectors = linear(model(torch.tensor([ids]), attention_mask=mask).last_hidden_state[0])
        found.append(torch.nn.functional.normalize(vectors)[left].numpy())
    return found


def asked(manifest: Any, variant: str = FP32, prompt_name: str | None = None) -> list[Any]:
    def embed(service: Any) -> Any:
        return structured.embed_all(service, TEXTS, Caller(), LIMITS, prompt_name=prompt_name)

    return [np.asarray(list(rows)) for rows in ask(manifest, variant, embed).values]


def check(found: list[Any], expected: list[Any], close: float = 1e-4) -> None:
    for rows, right in zip(found, expected, strict=True):
        np.testing.assert_allclose(rows, right, atol=close)


def test_vectors_of_tokens(tiny_model: ModelMaker, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    expansion = {"strategy": "fixed", "attend": True, "length": 6}
    words = ["of", "the", "no such word"]
    linear = save_multi(tiny_model(), folder, {"query_expansion": expansion}, skiplist_words=words)
    described = describe_folder(str(folder), None)
    assert (described.task, described.width) == ("token-embedding", 24)
    right = {"document": token_vectors(folder, linear, "the ", tuple(words)), "query": None}
    right["query"] = token_vectors(folder, linear, "of ", size=6)
    for name, expected in right.items():
        check(asked(described, prompt_name=name), expected)
    check(asked(described), right["document"])
    variants = "torch_ext-fp32,torch_ext-int8,onnx-fp32"
    options = ["--max-texts", "8", "--speed-seconds", "0", "--quiet", "--variants", variants]
    assert main([str(folder), "-o", str(tmp_path / "out"), *options]) == 0
    manifest = load_manifest(tmp_path / "out")
    assert manifest.token_vectors == described.token_vectors
    for variant, close in ((FP32, 1e-4), ("onnx-fp32", 1e-4), ("torch_ext-int8", 0.1)):
        check(asked(manifest, variant, "query"), right["query"], close)


def test_queries_with_tokens_that_others_do_not_see(tiny_model: ModelMaker, tmp_path: Path) -> None:
    """Their tokens have vectors, as many as the model says, and change no other's."""
    folder = tmp_path / "model"
    settings = {"query_expansion": {"strategy": "fixed", "length": 12}, "document_length": 5}
    linear = save_multi(tiny_model(), folder, settings, skiplist_tasks=[])
    described = describe_folder(str(folder), None)
    assert described.token_vectors == TokenVectors(True, Role(5), Role(12, pad_to=12, pad_id=4, attends=False))
    document = token_vectors(folder, linear, "the ", size=5)
    check(asked(described)[:1], document[:1])
    right = token_vectors(folder, linear, "of ", size=12, attend=False)
    assert [len(rows) for rows in right] == [12, 12, 12]
    attended = token_vectors(folder, linear, "of ", size=12)
    assert np.abs(right[0] - attended[0]).max() > 0.01
    check(asked(described, prompt_name="query"), right)
    program = "torch-export-bf16"
    variants = f"torch_ext-fp32,torch_ext-int8,onnx-int8,onnx-fp32,{program}"
    options = ["--max-texts", "8", "--speed-seconds", "0", "--quiet", "--variants", variants]
    assert main([str(folder), "-o", str(tmp_path / "out"), *options]) == 0
    manifest = load_manifest(tmp_path / "out")
    assert manifest.token_vectors == described.token_vectors
    for variant, close in ((FP32, 1e-4), ("onnx-fp32", 1e-4), ("torch_ext-int8", 0.1), (program, 0.1)):
        check(asked(manifest, variant, "query"), right, close)

    # Queries and documents of several clients in one batch.
    def both(service: Any) -> Any:
        asked = [structured.embed_all(service, TEXTS, Caller(), LIMITS, prompt_name=name) for name in ("query", None)]
        return asyncio.gather(*asked, *(structured.embed_all(service, ["the of"], Caller(), LIMITS) for _ in range(3)))

    for variant in (FP32, "onnx-fp32"):
        queries, documents, *_ = ask(manifest, variant, both)
        check([np.asarray(list(rows)) for rows in queries.values], right)
        check([np.asarray(list(rows)) for rows in documents.values][:1], document[:1])
        assert queries.tokens == 36


def test_bundles_from_before_such_queries_were_supported(tiny_model: ModelMaker, tmp_path: Path) -> None:
    settings = {"query_expansion": {"strategy": "min", "length": 6}}
    save_multi(tiny_model(), tmp_path / "model", settings)
    options = ["--max-texts", "8", "--speed-seconds", "0", "--quiet", "--variants", FP32]
    assert main([str(tmp_path / "model"), "-o", str(tmp_path / "out"), *options]) == 0
    manifest = load_manifest(tmp_path / "out")
    assert manifest.token_vectors is not None
    assert manifest.token_vectors.query == Role(None, pad_to=6, pad_id=4, attends=False)
    path = tmp_path / "out" / "manifest.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    del content["token_vectors"]["query"]["attends"]
    path.write_text(json.dumps(content), encoding="utf-8")
    older = load_manifest(tmp_path / "out").token_vectors
    assert older is not None
    assert older.query == Role(None, pad_to=6, pad_id=4)
    content["token_vectors"]["query"] = None
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ApiError, match=r"query_expansion without attend.*export it again"):
        asked(load_manifest(tmp_path / "out"), prompt_name="query")


@pytest.mark.parametrize("model_type", ["deberta", "esm"])
def test_architectures_that_use_the_mask_elsewhere(model_type: str, tiny_model: ModelMaker, tmp_path: Path) -> None:
    """In transformers, tokens that are not attended to have another embedding there."""
    save_multi(tiny_model(), tmp_path / "model", {"query_expansion": {"strategy": "fixed", "length": 6}})
    change(tmp_path / "model" / "config.json", model_type=model_type)
    vectors = describe_folder(str(tmp_path / "model"), None).token_vectors
    assert vectors is not None
    assert vectors.query is None


def save_pylate(folder: Path, target: Path, **settings: Any) -> torch.nn.Linear:
    """Writes a model of PyLate, which lists a Transformer and a Dense, and returns its linear stage."""
    linear = save_multi(folder, target)
    kinds = {"": "sentence_transformers.models.Transformer", "1_Dense": "pylate.models.Dense.Dense"}
    modules = [{"path": path, "type": kind} for path, kind in kinds.items()]
    (target / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    identity = "torch.nn.modules.linear.Identity"
    dense = {"in_features": 64, "out_features": 24, "bias": False, "activation_function": identity}
    (target / "1_Dense" / "config.json").write_text(json.dumps(dense), encoding="utf-8")
    said = {"model_type": "ColBERT", "query_prefix": "of ", "document_prefix": "the ", "query_length": 6, **settings}
    (target / "config_sentence_transformers.json").write_text(json.dumps(said), encoding="utf-8")
    return linear


def test_a_model_of_pylate(tiny_model: ModelMaker, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    linear = save_pylate(tiny_model(), folder, attend_to_expansion_tokens=True, skiplist_words=["of", "the"])
    manifest = describe_folder(str(folder), None)
    assert (manifest.task, manifest.width) == ("token-embedding", 24)
    check(asked(manifest, prompt_name="query"), token_vectors(folder, linear, "of ", size=6))
    check(asked(manifest), token_vectors(folder, linear, "the ", ("of", "the")))
    # Its first versions do not say whose model it is.
    path = folder / "config_sentence_transformers.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    del settings["model_type"]
    path.write_text(json.dumps(settings), encoding="utf-8")
    assert describe_folder(str(folder), None) == manifest
    options = ["--max-texts", "8", "--speed-seconds", "0", "--quiet", "--variants", FP32]
    assert main([str(folder), "-o", str(tmp_path / "out"), *options]) == 0
    assert load_manifest(tmp_path / "out").token_vectors == manifest.token_vectors
    check(asked(load_manifest(tmp_path / "out"), prompt_name="query"), token_vectors(folder, linear, "of ", size=6))


def test_queries_of_pylate(tiny_model: ModelMaker, tmp_path: Path) -> None:
    """As it saves them: nobody asked for attention to what fills them up."""
    folder = tmp_path / "model"
    linear = save_pylate(tiny_model("roberta"), folder, query_length=12)
    manifest = describe_folder(str(folder), None)
    check(asked(manifest, prompt_name="query"), token_vectors(folder, linear, "of ", size=12, attend=False))


def test_what_pylate_takes_for_granted(tiny_model: ModelMaker, tmp_path: Path) -> None:
    save_pylate(tiny_model(), tmp_path / "a", query_length=None, document_length=40)
    vectors = describe_folder(str(tmp_path / "a"), None).token_vectors
    assert vectors is not None
    assert (vectors.normalize, vectors.document.max_tokens) == (True, 40)
    assert vectors.query == Role(32, pad_to=32, pad_id=4, attends=False)
    assert len(vectors.document.skipped) == 32  # Punctuation.
    save_pylate(tiny_model(), tmp_path / "b", do_query_expansion=False, skiplist_words=[])
    vectors = describe_folder(str(tmp_path / "b"), None).token_vectors
    assert vectors == TokenVectors(True, Role(None), Role(6))
    save_pylate(tiny_model(), tmp_path / "c", skiplist_words="the")
    with pytest.raises(FolderError, match="skiplist_words: expected an array of words, got 'the'"):
        describe_folder(str(tmp_path / "c"), None)


@pytest.mark.parametrize("prefix", ["[unused0]", "[Q] "])
def test_prefixes_of_pylate_are_tokens(prefix: str, tiny_model: ModelMaker, tmp_path: Path) -> None:
    """One of the vocabulary, and one that was added and has its letters lower-cased."""
    folder = tmp_path / "model"
    save_pylate(tiny_model(), folder, query_prefix=prefix, do_query_expansion=False)
    size = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    if prefix == "[Q] ":
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
        tokenizer["added_tokens"].append({"id": size, "content": prefix, **flags})
    else:
        tokenizer["model"]["vocab"][prefix] = size
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("word_embeddings.weight"))
    weights[name] = torch.cat([weights[name], weights[name][-1:]])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    change(folder / "config.json", vocab_size=size + 1)
    options = ["--max-texts", "8", "--speed-seconds", "0", "--quiet", "--variants", FP32]
    assert main([str(folder), "-o", str(tmp_path / "out"), *options]) == 0
    for manifest in (describe_folder(str(folder), None), load_manifest(tmp_path / "out")):
        tokens = TextTokenizer.from_manifest(manifest)
        ids = list(map(int, tokens.encode(["the list"], truncate=True, prompt=prefix)[0]))
        assert ids[1] == size, ids
        assert len(ids) == 5


@pytest.mark.parametrize(
    ("file", "fields", "message"),
    [
        ("1_Dense", {"use_residual": True}, "a Dense module with use_residual is not supported"),
        ("1_Dense", {"module_input_name": "sentence_embedding"}, "a Dense module elsewhere"),
        ("2_MultiVectorMask", {"skiplist_words": "the"}, "expected arrays of words"),
        ("3_Normalize", {"module_input_name": "other"}, "a Normalize module of"),
        ("", {"query_expansion": {"strategy": "most", "length": 3}}, "expected a length, strategy fixed or min"),
    ],
)
def test_what_is_not_supported(
    file: str, fields: dict[str, Any], message: str, tiny_model: ModelMaker, tmp_path: Path
) -> None:
    save_multi(tiny_model(), tmp_path / "model")
    change(tmp_path / "model" / file / ("config.json" if file else "sentence_bert_config.json"), **fields)
    with pytest.raises(FolderError, match=message):
        describe_folder(str(tmp_path / "model"), None)
