"""Masks that are filled: tokens, scores and texts of the route of the hub are those of transformers' pipeline.

Not where transformers 4 takes spaces from around an apostrophe (`clean_up_tokenization_spaces`), which 5 does not.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from server_harness import ask

from deploy.bundle import load_manifest
from deploy.export.cli import main
from deploy.server.api.hub_masks import encode_fillings
from deploy.server.limits.bounds import Limits
from deploy.server.limits.callers import Caller

QUICK = ["--max-texts", "8", "--speed-seconds", "0", "--quiet", "--variants", "torch_ext-fp32", "--max-tokens", "60"]
LIMITS = Limits(inputs=100, chars=5000, masks=8, values=1 << 20)
TEXTS = [
    "The Name of the {0}, and (un-believable) values.",
    "{0}",
    "{0} do not  MIX {0}; naïve façade 日本 {0}",
    "a file\tof {0}\n it is of (this) .",
]


@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_fillings_are_those_of_the_pipeline(
    architecture: str, tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_model(architecture, "fill-mask")
    assert main([str(folder), "-o", str(tmp_path / "out"), *QUICK]) == 0
    manifest = load_manifest(tmp_path / "out")
    mask = manifest.special_tokens["mask"]
    assert mask is not None
    texts = [text.format(mask.token) for text in TEXTS]

    async def fill(service: Any) -> Any:
        result = await service.fill(texts, Caller(), LIMITS, top_k=4, truncate=True)
        # The request's ids are enough: texts are not tokenised again, on the event loop, for the answer.
        monkeypatch.delattr(service.tokenizer.__class__, "encode")
        answer = encode_fillings(texts, result, service.tokenizer, mask.id, single=False)
        return json.loads(bytes(answer)), service.tokenizer.token

    found, token_text = ask(manifest, "torch_ext-fp32", fill)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers

        pipe = transformers.pipeline("fill-mask", str(folder), device="cpu")
        for text, answer in zip(texts, found, strict=True):
            expected = pipe(text, top_k=4)
            assert len(answer) == len(expected)
            for row, right in zip(answer, expected, strict=True):
                for item, other in zip(*((row, right) if isinstance(row, list) else ([row], [right])), strict=True):
                    # The engine of `ask` has no texts of tokens.
                    named = {**item, "token_str": token_text(item["token"]), "score": 0}
                    assert named == {**other, "score": 0}, text
                    assert item["score"] == pytest.approx(other["score"], abs=1e-5)
