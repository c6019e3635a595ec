"""JSON bodies, read and written."""

from __future__ import annotations

from typing import Any

import msgspec
import orjson

from .errors import ApiError

__all__ = ["decode", "encode"]


def decode(decoder: msgspec.json.Decoder[Any], body: bytes) -> Any:
    """A request from its JSON, checked against the decoder's type.

    Raises:
        ApiError: It is no JSON in UTF-8, or not of the type (422).
    """
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise ApiError("invalid_request", str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        hint = ""
        if b"\\ud" in body or b"\\uD" in body:
            hint = "; escapes from \\ud800 to \\udfff have to come in pairs"
        raise ApiError("invalid_request", f"expected one JSON object in UTF-8: {error}{hint}") from None


def encode(body: dict[str, Any]) -> bytes:
    """JSON of an answer; rows may be float32 arrays of NumPy."""
    return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
