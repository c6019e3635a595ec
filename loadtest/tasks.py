"""What is sent to each endpoint: a row for each, with what a right answer is (answers.py).

Nothing here knows Locust or sockets.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from loadtest import answers
from loadtest.answers import InvalidResponseError, Traits

__all__ = ["TASKS", "InvalidResponseError", "Task", "Traits", "insert_mask"]

_loads: Callable[[bytes], Any] = json.loads
with contextlib.suppress(ModuleNotFoundError):
    # Several times faster on 384 floats, on a machine that the load generator may share with the server.
    _loads = importlib.import_module("orjson").loads


@dataclass(frozen=True)
class Task:
    """One endpoint under test.

    Attributes:
        name: What ``--task`` calls it.
        path: Path of the endpoint; ``{model}`` in it stands for the name of the server's model.
        body: Turns texts into a JSON request body.
        check: Looks at the decoded answer to a number of texts; raises `InvalidResponseError`.
        needs_mask: Whether each text must hold the model's mask token.
        answers: What the answer is in JSON: an object (``dict``) or an array (``list``).
    """

    name: str
    path: str
    body: Callable[[Sequence[str], Traits], bytes]
    check: Callable[[Any, int, Traits], None]
    needs_mask: bool = False
    answers: type = dict

    def path_at(self, traits: Traits) -> str:
        """The path at a server.

        Args:
            traits: What is known of the server.
        """
        return self.path.replace("{model}", quote(traits.model, safe=""))

    def validate(self, content: bytes | None, count: int, traits: Traits) -> int | None:
        """Checks a response body.

        Args:
            content: Body of a response with status 200.
            count: How many texts were sent.
            traits: What is known of the server; the dimension of the first embedding is noted down here.

        Returns:
            How many tokens the server says it computed, or None if it does not say.

        Raises:
            InvalidResponseError: Not JSON, the wrong shape or number of results, or a number that is not finite.
        """
        try:
            answer = _loads(content or b"")
        except ValueError as error:
            start = (content or b"")[:60]
            raise InvalidResponseError(f"{self.path}: expected JSON, got {start!r}") from error
        if not isinstance(answer, self.answers):
            expected = "object" if self.answers is dict else "array"
            raise InvalidResponseError(f"{self.path}: expected a JSON {expected}, got {type(answer).__name__}")
        self.check(answer, count, traits)
        usage = answer.get("usage") if isinstance(answer, dict) else None
        if isinstance(usage, dict):
            for key in ("tokens", "prompt_tokens", "total_tokens"):
                if isinstance(usage.get(key), int):
                    return int(usage[key])
        return None


def insert_mask(text: str, mask_token: str, rng: random.Random) -> str:
    """Replaces one of the first words of a text by the mask token; early, so that truncation never removes it.

    Args:
        text: A text with at least one word.
        mask_token: The model's own, such as ``[MASK]`` or ``<mask>``.
        rng: Decides which word.
    """
    words = text.split()
    if not words:
        return mask_token
    words[rng.randrange(min(len(words), 16))] = mask_token
    return " ".join(words)


def _dump(body: dict[str, Any]) -> bytes:
    return json.dumps(body, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _question(text: str) -> str:
    """A question about a text: its first words."""
    return " ".join(text.split()[:5]) or "what?"


def _questions(texts: Sequence[str]) -> list[dict[str, str]]:
    return [{"question": _question(text), "context": text or "nothing"} for text in texts]


def _inputs(texts: Sequence[str], _: Traits) -> bytes:
    return _dump({"inputs": list(texts)})


def _tei_pairs(texts: Sequence[str], _: Traits) -> bytes:
    return _dump({"inputs": [[_question(text), text or "nothing"] for text in texts]})


def _rank(key: str, *, with_model: bool = False) -> Callable[[Sequence[str], Traits], bytes]:
    """A query, which is the beginning of the first text, and texts to rank by it."""

    def body(texts: Sequence[str], traits: Traits) -> bytes:
        model = {"model": traits.model} if with_model else {}
        return _dump({**model, "query": _question(texts[0]), key: [text or "nothing" for text in texts]})

    return body


def _tensor(name: str, values: Sequence[str]) -> dict[str, Any]:
    return {"name": name, "shape": [len(values)], "datatype": "BYTES", "data": list(values)}


def _tensors(texts: Sequence[str], _: Traits) -> bytes:
    return _dump({"inputs": [_tensor("text", texts)]})


def _tensor_pairs(texts: Sequence[str], _: Traits) -> bytes:
    pairs = [
        _tensor("text", [_question(text) for text in texts]),
        _tensor("text_pair", [text or "-" for text in texts]),
    ]
    return _dump({"inputs": pairs})


def _oip(name: str, body: Callable[[Sequence[str], Traits], bytes], *, needs_mask: bool = False) -> Task:
    return Task(name, "/v2/models/{model}/infer", body, answers.check_tensors, needs_mask)


_ROWS = (
    # The server's own.
    Task("embed", "/api/embed", _inputs, answers.check_embed),
    Task("predict", "/api/classify", _inputs, answers.check_predict),
    Task("token-classify", "/api/token-classify", _inputs, answers.check_token_classify),
    Task("answer", "/api/answer", lambda texts, _: _dump({"inputs": _questions(texts)}), answers.check_answer),
    Task(
        "fill-mask",
        "/api/fill-mask",
        lambda texts, traits: _dump({"inputs": list(texts), "top_k": traits.top_k}),
        answers.check_fill_mask,
        needs_mask=True,
    ),
    Task(
        "similarity",
        "/api/similarity",
        lambda texts, _: _dump({"source": _question(texts[0]), "texts": list(texts)}),
        answers.check_similarity,
    ),
    # OpenAI's.
    Task(
        "openai",
        "/v1/embeddings",
        lambda texts, traits: _dump(
            {"model": traits.model, "input": list(texts), "encoding_format": traits.encoding_format}
        ),
        answers.check_openai,
    ),
    # Those of text-embeddings-inference.
    Task("tei-embed", "/embed", _inputs, answers.check_vectors, answers=list),
    Task("tei-embed-all", "/embed_all", _inputs, answers.check_all_vectors, answers=list),
    Task("tei-embed-sparse", "/embed_sparse", _inputs, answers.check_sparse, answers=list),
    Task(
        "tei-predict",
        "/predict",
        lambda texts, _: _dump({"inputs": [[text] for text in texts]}),
        answers.check_labels,
        answers=list,
    ),
    Task("tei-predict-pairs", "/predict", _tei_pairs, answers.check_labels, answers=list),
    Task("tei-rerank", "/rerank", _rank("texts"), answers.check_ranks, answers=list),
    Task(
        "tei-similarity",
        "/similarity",
        lambda texts, _: _dump({"inputs": {"source_sentence": _question(texts[0]), "sentences": list(texts)}}),
        answers.check_cosines,
        answers=list,
    ),
    # Embeddings and rerankers as Cohere and Jina have them.
    Task(
        "cohere-embed",
        "/v2/embed",
        lambda texts, traits: _dump({"model": traits.model, "texts": list(texts), "input_type": "search_document"}),
        answers.check_by_type,
    ),
    Task("cohere-rerank", "/v2/rerank", _rank("documents", with_model=True), answers.check_results),
    Task("jina-rerank", "/v1/rerank", _rank("documents", with_model=True), answers.check_results),
    # The Open Inference Protocol v2 (KServe, Triton), in JSON. What the model computes is the model's affair.
    _oip("oip", _tensors),
    _oip("oip-pairs", _tensor_pairs),
    _oip("oip-fill-mask", _tensors, needs_mask=True),
)

TASKS: dict[str, Task] = {task.name: task for task in _ROWS}
"""Every endpoint that can be tested, by the name that ``--task`` takes."""
