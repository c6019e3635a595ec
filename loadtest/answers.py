"""What must come back from each endpoint.

A response is right only if it has the right shape, as many results as there were texts, and finite numbers: a server
under load that answers quickly with nonsense must not look fast. Nothing here knows Locust or sockets.
"""

from __future__ import annotations

import base64
import binascii
import itertools
import math
import struct
from dataclasses import dataclass
from typing import Any

__all__ = ["InvalidResponseError", "Traits"]


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


def expect_list(answer: Any, what: str, count: int | None = None) -> list[Any]:
    """Returns a list that is one, of as many items as there were texts."""
    if not isinstance(answer, list):
        raise InvalidResponseError(f"expected {what} to be a list, got {type(answer).__name__}")
    if count is not None and len(answer) != count:
        raise InvalidResponseError(f"expected {count} {what}, one per text, got {len(answer)}")
    return answer


def check_vector(vector: Any, traits: Traits) -> None:
    """An embedding: finite numbers, as many as in the first one."""
    vector = expect_list(vector, "an embedding")
    if traits.dimension is None and vector:
        traits.dimension = len(vector)
    if not vector or len(vector) != traits.dimension:
        raise InvalidResponseError(f"expected an embedding of {traits.dimension or 'some'} numbers, got {len(vector)}")
    try:
        if not all(map(math.isfinite, vector)):
            raise InvalidResponseError("expected finite numbers in an embedding, got NaN or infinity")
    except TypeError as error:
        raise InvalidResponseError("expected numbers in an embedding, got something else") from error


def check_number(value: Any, where: str, what: str = "score") -> None:
    """A finite number."""
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InvalidResponseError(f"expected a finite {what} in {where}, got {value!r}")


def check_embed(answer: dict[str, Any], count: int, traits: Traits) -> None:
    """Per text an embedding."""
    check_vectors(answer.get("embeddings"), count, traits)


def check_openai(answer: dict[str, Any], count: int, traits: Traits) -> None:
    """Per text an embedding, in order, as numbers or in base64."""
    for position, row in enumerate(expect_list(answer.get("data"), "data", count)):
        if not isinstance(row, dict) or row.get("index") != position:
            raise InvalidResponseError(f"expected data[{position}] to be an object with index {position}")
        vector: Any = row.get("embedding")
        if traits.encoding_format == "base64":
            try:
                raw = base64.b64decode(vector, validate=True)
                vector = list(struct.unpack(f"<{len(raw) // 4}f", raw))
            except (TypeError, ValueError, binascii.Error, struct.error) as error:
                raise InvalidResponseError("expected an embedding in base64 of 32-bit floats") from error
        check_vector(vector, traits)


def check_scores(candidates: Any, what: str, key: str) -> None:
    """At least one candidate, each with its name and a finite score."""
    if not expect_list(candidates, what):
        raise InvalidResponseError(f"expected at least one of {what}, got none")
    for candidate in candidates:
        if not isinstance(candidate, dict) or not isinstance(candidate.get(key), str):
            raise InvalidResponseError(f"expected each of {what} to be an object with a string {key!r}")
        check_number(candidate.get("score"), f"each of {what}")


def check_predict(answer: dict[str, Any], count: int, traits: Traits) -> None:
    """Per text every label with its score."""
    check_labels(answer.get("predictions"), count, traits)


def check_places(found: Any, what: str) -> None:
    """Parts of a text: each with a finite score, and where it begins and ends. There may be none."""
    for item in expect_list(found, what):
        start, end = (item.get("start"), item.get("end")) if isinstance(item, dict) else (None, None)
        if not isinstance(start, int) or not isinstance(end, int) or not 0 <= start <= end:
            raise InvalidResponseError(f"expected a start and an end in each of {what}, got {item!r}")
        check_number(item.get("score"), f"each of {what}")


def check_token_classify(answer: dict[str, Any], count: int, traits: Traits) -> None:
    """Per text its entities; there may be none."""
    for found in expect_list(answer.get("predictions"), "predictions", count):
        check_places(found, "entities")


def check_answer(answer: dict[str, Any], count: int, traits: Traits) -> None:
    """Per question its answers; there may be none."""
    for found in expect_list(answer.get("predictions"), "predictions", count):
        check_places(found, "answers")


def check_fill_mask(answer: dict[str, Any], count: int, traits: Traits) -> None:
    """Per text, for its one mask, `top_k` candidates."""
    for masks in expect_list(answer.get("predictions"), "predictions", count):
        if not expect_list(masks, "masks of a text"):
            raise InvalidResponseError("expected candidates for one mask in each text, got none")
        for candidates in masks:
            check_scores(candidates, "candidates", "token")
            if len(candidates) != traits.top_k:
                raise InvalidResponseError(
                    f"expected top_k={traits.top_k} candidates for a mask, got {len(candidates)}"
                )


def check_sparse(answer: Any, count: int, traits: Traits) -> None:
    """Per text the words with a weight above 0; there may be none."""
    for words in expect_list(answer, "sparse vectors", count):
        for word in expect_list(words, "a sparse vector"):
            if not isinstance(word, dict) or not isinstance(word.get("index"), int):
                raise InvalidResponseError(f"expected each word of a sparse vector to have an index, got {word!r}")
            check_number(word.get("value"), "each word of a sparse vector", "value")


def check_by_type(answer: dict[str, Any], count: int, traits: Traits) -> None:
    """Embeddings as Cohere answers them: by their type, here floats."""
    by_type = answer.get("embeddings")
    if not isinstance(by_type, dict):
        raise InvalidResponseError(f"expected embeddings by type, got {by_type!r:.80}")
    check_vectors(by_type.get("float"), count, traits)


def check_vectors(answer: Any, count: int, traits: Traits) -> None:
    """Per text an embedding."""
    for vector in expect_list(answer, "embeddings", count):
        check_vector(vector, traits)


def check_all_vectors(answer: Any, count: int, traits: Traits) -> None:
    """Per text an embedding of each token."""
    for vectors in expect_list(answer, "texts with embeddings", count):
        check_vectors(vectors, max(1, len(expect_list(vectors, "embeddings of a text"))), traits)


def check_labels(answer: Any, count: int, traits: Traits) -> None:
    """Per text, or pair of texts, every label with its score."""
    for scores in expect_list(answer, "predictions", count):
        check_scores(scores, "labels", "label")


def check_cosines(answer: Any, count: int, traits: Traits) -> None:
    """Per text a number."""
    for cosine in expect_list(answer, "similarities", count):
        check_number(cosine, "similarities")


def check_similarity(answer: dict[str, Any], count: int, traits: Traits) -> None:
    """The same within an object."""
    check_cosines(answer.get("similarities"), count, traits)


def check_ranks(answer: Any, count: int, traits: Traits, key: str = "score") -> None:
    """Every text once, by its index, with a score, the best first."""
    ranks = expect_list(answer, "ranks", count)
    for rank in ranks:
        if not isinstance(rank, dict):
            raise InvalidResponseError(f"expected each rank to be an object, got {type(rank).__name__}")
        check_number(rank.get(key), "each rank", key)
    if sorted(str(rank.get("index")) for rank in ranks) != sorted(map(str, range(count))):
        raise InvalidResponseError(f"expected each index from 0 to {count - 1} once")
    scores = [rank[key] for rank in ranks]
    if any(first < second for first, second in itertools.pairwise(scores)):
        raise InvalidResponseError("expected the best rank first")


def check_results(answer: dict[str, Any], count: int, traits: Traits) -> None:
    """Ranks as Cohere and Jina answer them."""
    check_ranks(answer.get("results"), count, traits, "relevance_score")


def check_tensors(answer: dict[str, Any], count: int, traits: Traits) -> None:
    """Tensors of the Open Inference Protocol: a row for each text, as many values as the shape says, finite ones."""
    tensors = expect_list(answer.get("outputs"), "outputs")
    if not tensors:
        raise InvalidResponseError("expected at least one output tensor, got none")
    for tensor in tensors:
        shape = tensor.get("shape") if isinstance(tensor, dict) else None
        if not isinstance(shape, list) or not shape or not all(isinstance(size, int) for size in shape):
            raise InvalidResponseError(f"expected each output to have a shape, got {str(tensor)[:60]}")
        if shape[0] != count:
            raise InvalidResponseError(f"expected {count} rows in each output, one per text, got {shape[0]}")
        data = expect_list(tensor.get("data"), "data of an output")
        if len(data) != math.prod(shape):
            raise InvalidResponseError(
                f"expected {math.prod(shape)} values in an output of shape {shape}, got {len(data)}"
            )
        if tensor.get("datatype") != "BYTES":
            try:
                finite = all(map(math.isfinite, data))
            except TypeError as error:
                raise InvalidResponseError("expected numbers in an output, got something else") from error
            if not finite:
                raise InvalidResponseError("expected finite numbers in an output, got NaN or infinity")
