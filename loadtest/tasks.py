"""What is sent to each endpoint, and what must come back.

A response is right only if it has the right shape, as many results as there were texts, and finite numbers: a server
under load that answers quickly with nonsense must not look fast. Nothing here knows Locust.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import importlib
import json
import math
import random
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["TASKS", "InvalidResponseError", "Task", "Traits", "insert_mask"]

_loads: Callable[[bytes], Any] = json.loads
with contextlib.suppress(ModuleNotFoundError):
    # Several times faster on 384 floats, on a machine that the load generator may share with the server.
    _loads = importlib.import_module("orjson").loads


class InvalidResponseError(ValueError):
    """A response that is not what the endpoint promises; the message says what was expected and what came."""


@dataclass
class Traits:
    """What a load test learns about the server before it starts.

    Attributes:
        model: Name to send to OpenAI's endpoint.
        mask_token: What stands for a gap in a text, such as ``[MASK]``; None if the model has none.
        dimension: Length of an embedding; None until the first answer.
        encoding_format: ``float`` or ``base64`` (OpenAI's endpoint only).
        top_k: Candidates asked for at each gap (fill-mask only).
    """

    model: str = ""
    mask_token: str | None = None
    dimension: int | None = None
    encoding_format: str = "float"
    top_k: int = 5


@dataclass(frozen=True)
class Task:
    """One endpoint under test.

    Attributes:
        name: What ``--task`` calls it.
        path: Path of the endpoint.
        body: Turns texts into a JSON request body.
        check: Looks at the decoded answer to a number of texts; raises `InvalidResponseError`.
        needs_mask: Whether each text must hold the model's mask token.
    """

    name: str
    path: str
    body: Callable[[Sequence[str], Traits], bytes]
    check: Callable[[Any, int, Traits], None]
    needs_mask: bool = False

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
        if not isinstance(answer, dict):
            raise InvalidResponseError(f"{self.path}: expected a JSON object, got {type(answer).__name__}")
        self.check(answer, count, traits)
        usage = answer.get("usage")
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


def _expect_list(answer: Any, what: str, count: int | None = None) -> list[Any]:
    if not isinstance(answer, list):
        raise InvalidResponseError(f"expected {what} to be a list, got {type(answer).__name__}")
    if count is not None and len(answer) != count:
        raise InvalidResponseError(f"expected {count} {what}, one per text, got {len(answer)}")
    return answer


def _check_vector(vector: Any, traits: Traits) -> None:
    vector = _expect_list(vector, "an embedding")
    if traits.dimension is None and vector:
        traits.dimension = len(vector)
    if not vector or len(vector) != traits.dimension:
        raise InvalidResponseError(f"expected an embedding of {traits.dimension or 'some'} numbers, got {len(vector)}")
    try:
        if not all(map(math.isfinite, vector)):
            raise InvalidResponseError("expected finite numbers in an embedding, got NaN or infinity")
    except TypeError as error:
        raise InvalidResponseError("expected numbers in an embedding, got something else") from error


def _check_embed(answer: dict[str, Any], count: int, traits: Traits) -> None:
    for vector in _expect_list(answer.get("embeddings"), "embeddings", count):
        _check_vector(vector, traits)


def _check_openai(answer: dict[str, Any], count: int, traits: Traits) -> None:
    for position, row in enumerate(_expect_list(answer.get("data"), "data", count)):
        if not isinstance(row, dict) or row.get("index") != position:
            raise InvalidResponseError(f"expected data[{position}] to be an object with index {position}")
        vector: Any = row.get("embedding")
        if traits.encoding_format == "base64":
            try:
                raw = base64.b64decode(vector, validate=True)
                vector = list(struct.unpack(f"<{len(raw) // 4}f", raw))
            except (TypeError, ValueError, binascii.Error, struct.error) as error:
                raise InvalidResponseError("expected an embedding in base64 of 32-bit floats") from error
        _check_vector(vector, traits)


def _check_scores(candidates: Any, what: str, key: str) -> None:
    if not _expect_list(candidates, what):
        raise InvalidResponseError(f"expected at least one of {what}, got none")
    for candidate in candidates:
        if not isinstance(candidate, dict) or not isinstance(candidate.get(key), str):
            raise InvalidResponseError(f"expected each of {what} to be an object with a string {key!r}")
        score = candidate.get("score")
        if not isinstance(score, (int, float)) or not math.isfinite(score):
            raise InvalidResponseError(f"expected a finite score in each of {what}, got {score!r}")


def _check_predict(answer: dict[str, Any], count: int, traits: Traits) -> None:
    for scores in _expect_list(answer.get("predictions"), "predictions", count):
        _check_scores(scores, "labels", "label")


def _check_places(found: Any, what: str) -> None:
    """Parts of a text: each with a finite score, and where it begins and ends. There may be none."""
    for item in _expect_list(found, what):
        start, end = (item.get("start"), item.get("end")) if isinstance(item, dict) else (None, None)
        if not isinstance(start, int) or not isinstance(end, int) or not 0 <= start <= end:
            raise InvalidResponseError(f"expected a start and an end in each of {what}, got {item!r}")
        score = item.get("score")
        if not isinstance(score, (int, float)) or not math.isfinite(score):
            raise InvalidResponseError(f"expected a finite score in each of {what}, got {score!r}")


def _check_token_classify(answer: dict[str, Any], count: int, traits: Traits) -> None:
    for found in _expect_list(answer.get("predictions"), "predictions", count):
        _check_places(found, "entities")


def _questions(texts: Sequence[str]) -> list[dict[str, str]]:
    """A question about each text: its first words."""
    return [{"question": " ".join(text.split()[:5]) or "what?", "context": text or "nothing"} for text in texts]


def _check_answer(answer: dict[str, Any], count: int, traits: Traits) -> None:
    for found in _expect_list(answer.get("predictions"), "predictions", count):
        _check_places(found, "answers")


def _check_fill_mask(answer: dict[str, Any], count: int, traits: Traits) -> None:
    for masks in _expect_list(answer.get("predictions"), "predictions", count):
        if not _expect_list(masks, "masks of a text"):
            raise InvalidResponseError("expected candidates for one mask in each text, got none")
        for candidates in masks:
            _check_scores(candidates, "candidates", "token")
            if len(candidates) != traits.top_k:
                raise InvalidResponseError(
                    f"expected top_k={traits.top_k} candidates for a mask, got {len(candidates)}"
                )


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("embed", "/api/embed", lambda texts, _: _dump({"inputs": list(texts)}), _check_embed),
        Task("predict", "/api/classify", lambda texts, _: _dump({"inputs": list(texts)}), _check_predict),
        Task(
            "token-classify",
            "/api/token-classify",
            lambda texts, _: _dump({"inputs": list(texts)}),
            _check_token_classify,
        ),
        Task("answer", "/api/answer", lambda texts, _: _dump({"inputs": _questions(texts)}), _check_answer),
        Task(
            "fill-mask",
            "/api/fill-mask",
            lambda texts, traits: _dump({"inputs": list(texts), "top_k": traits.top_k}),
            _check_fill_mask,
            needs_mask=True,
        ),
        Task(
            "openai",
            "/v1/embeddings",
            lambda texts, traits: _dump(
                {"model": traits.model, "input": list(texts), "encoding_format": traits.encoding_format}
            ),
            _check_openai,
        ),
    )
}
"""Every endpoint that can be tested, by the name that ``--task`` takes."""
