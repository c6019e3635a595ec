"""A vector for each token: the hidden states of transformers."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

from server_harness import ask, make_manifest, running

from deploy.bundle import Prompts, Role, TokenVectors, load_manifest
from deploy.engines.batch import FilledIds, plain_ids
from deploy.server.limits.bounds import Limits, Settings
from deploy.server.limits.callers import Caller
from deploy.server.service import structured
from deploy.tasks import Rows
from deploy.tasks.feature_extraction import TokenVectorOptions

TEXTS = ["the name of the file", "", "returns the values of all objects"]
LIMITS = Limits(inputs=100, chars=5000, values=1 << 20)


def test_vectors_are_the_hidden_states(
    tiny_model: Callable[..., Path], tiny_bundle: Callable[[str, str], Path]
) -> None:
    manifest = load_manifest(tiny_bundle("bert", "feature-extraction"), verify=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        import transformers

        folder = tiny_model("bert", "feature-extraction")
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = transformers.AutoModel.from_pretrained(folder).eval()
        with torch.inference_mode():
            expected = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].numpy() for text in TEXTS]
    for variant, close in (("torch_ext-fp32", 1e-4), ("onnx-fp32", 1e-4), ("torch_ext-bf16", 0.2)):
        result = ask(manifest, variant, lambda service: structured.embed_all(service, TEXTS, Caller(), LIMITS))
        assert result.tokens == sum(map(len, expected))
        for rows, right in zip(result.values, expected, strict=True):
            np.testing.assert_allclose(np.asarray(list(rows)), right, atol=close)


def test_the_route(tmp_path: Path) -> None:
    with running(make_manifest(tmp_path), Settings(port=0, max_values=100)) as server:

        def run(ids: Any, options: Any) -> list[Any]:
            assert all(isinstance(option, TokenVectorOptions) for option in options)
            return [list(Rows(np.float32([[token] * 8 for token in text]))) for text in ids]

        server.engine.run = run  # type: ignore[method-assign]
        reply = server("POST", "/embed_all", {"inputs": ["w0", "w1 w2"]})
        assert reply.status == 200, reply.body
        assert reply.json == [[[token] * 8 for token in text] for text in ([2, 5, 3], [2, 6, 7, 3])]
        # 14 tokens of 8 numbers.
        assert server("POST", "/embed_all", {"inputs": "w0 " * 12}).status == 413


def test_queries_that_are_filled_up(tmp_path: Path) -> None:
    """The engine is told which tokens are the text's own; a text that is long enough is like any other."""
    role = Role(7, pad_to=6, pad_id=4, attends=False)
    manifest = replace(
        make_manifest(tmp_path, "token-embedding"),
        token_vectors=TokenVectors(True, Role(), role),
        prompts=Prompts({"query": ""}),
    )
    seen: list[Any] = []
    with running(manifest) as server:

        def run(ids: Any, options: Any) -> list[Any]:
            seen.extend(ids)
            return [list(Rows(np.float32([[token] * 8 for token in plain_ids(text)]))) for text in ids]

        server.engine.run = run  # type: ignore[method-assign]
        inputs = ["w0", "w1 w2 w3 w4"]
        reply = server("POST", "/embed_all", {"inputs": inputs, "prompt_name": "query"})
        assert reply.status == 200, reply.body
        assert [[row[0] for row in text] for text in reply.json] == [[2, 5, 3, 4, 4, 4], [2, 6, 7, 8, 9, 3]]
        assert server("POST", "/embed_all", {"inputs": inputs}).json[0] == [[token] * 8 for token in (2, 5, 3)]
    assert [text.attended if isinstance(text, FilledIds) else None for text in seen] == [3, None, None, None]
