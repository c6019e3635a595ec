"""What a server of the same interfaces answers to a well-formed request of each dialect."""

from __future__ import annotations

import base64
import struct
from typing import Any

DIMENSION = 8
MASK_TOKEN = "<mask>"
_VECTOR = [0.5] * DIMENSION
_LABELS = [{"label": "A", "score": 0.9}, {"label": "B", "score": 0.1}]


def texts_of(body: dict[str, Any]) -> list[Any]:
    """The texts of a request, or what they are part of."""
    for key in ("inputs", "input", "texts", "documents"):
        found = body.get(key)
        if isinstance(found, dict):
            return list(found["sentences"])
        if isinstance(found, list):
            return list(found[0]["data"]) if found and isinstance(found[0], dict) and "data" in found[0] else found
    raise AssertionError(f"no texts in {body}")


def right_answer(path: str, body: dict[str, Any]) -> Any:
    """What is answered with status 200."""
    texts = texts_of(body)
    count = len(texts)
    ranks = [(index, 0.9 - 0.01 * index) for index in range(count)]
    if path.startswith("/v2/models/stub/"):
        return _tensors(count)
    answers: dict[str, Any] = {
        "/api/embed": {"embeddings": [_VECTOR] * count, "model": "stub", "usage": {"tokens": 7 * count}},
        "/api/classify": {"predictions": [_LABELS] * count},
        "/api/token-classify": {
            "predictions": [[{"entity_group": "A", "score": 0.9, "word": "o", "start": 0, "end": 1}]] * count
        },
        "/api/answer": {"predictions": [[{"score": 0.9, "start": 0, "end": 1, "answer": "o"}]] * count},
        "/api/fill-mask": {
            "predictions": [[[{"token": "x", "token_id": 1, "score": 0.5}] * body.get("top_k", 0)]] * count
        },
        "/api/similarity": {"similarities": [0.5] * count, "model": "stub"},
        "/v1/embeddings": _openai(count, body),
        "/v2/embed": {"id": "1", "embeddings": {"float": [_VECTOR] * count}},
        "/embed": [_VECTOR] * count,
        "/embed_all": [[_VECTOR] * 3] * count,
        "/embed_sparse": [[{"index": 3, "value": 0.5}]] * count,
        "/predict": [_LABELS] * count,
        "/rerank": [{"index": index, "score": score} for index, score in ranks],
        "/similarity": [0.5] * count,
        "/v1/rerank": {"results": [{"index": index, "relevance_score": score} for index, score in ranks]},
    }
    answers["/v2/rerank"] = answers["/v1/rerank"]
    return answers[path]


def _openai(count: int, body: dict[str, Any]) -> dict[str, Any]:
    embedding: Any = _VECTOR
    if body.get("encoding_format") == "base64":
        embedding = base64.b64encode(struct.pack(f"<{DIMENSION}f", *_VECTOR)).decode()
    return {
        "object": "list",
        "data": [{"object": "embedding", "index": index, "embedding": embedding} for index in range(count)],
        "usage": {"prompt_tokens": 7 * count, "total_tokens": 7 * count},
    }


def _tensors(count: int) -> dict[str, Any]:
    return {
        "model_name": "stub",
        "outputs": [
            {"name": "scores", "datatype": "FP32", "shape": [count, 2], "data": [0.9, 0.1] * count},
            {"name": "labels", "datatype": "BYTES", "shape": [count, 2], "data": ["A", "B"] * count},
        ],
    }
