"""JSON bodies, read and written: small ones in one call, large ones in parts.

A call of msgspec or orjson holds the GIL until it is done, on whatever thread, and the event loop with it: 4 MB of one
million texts took 96 ms to decode, of as many lists of token ids 580 ms, and an answer of 1024 x 1024 floats 54 ms to
encode (Zen 1). So large bodies are cut into parts of a millisecond or less, one call each, on a helper thread.
"""

from __future__ import annotations

import functools
import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import msgspec
import orjson

from ..errors import ApiError
from ..limits.bounds import Limits, exceeded

__all__ = [
    "INLINE_BYTES",
    "INLINE_VALUES",
    "VALUE_CHARS",
    "Large",
    "decode",
    "decode_in_parts",
    "encode",
    "encode_in_parts",
    "encode_list",
    "encode_part",
    "encode_rows",
    "parts",
    "text_values",
]

INLINE_BYTES = 65_536
"""Bodies up to this long are decoded on the event loop: 0.05 to 0.3 ms of text."""

INLINE_VALUES = 16_384
"""Answers with up to this many numbers are encoded on the event loop: 0.8 ms."""

VALUE_CHARS = 16
"""So many characters of an answer's texts take as long as a number."""

_PART_BYTES = 32_768
_PART_VALUES = 8192
_SPARE_VALUES = 64
_GIVE_WAY_S = 2e-5
_HEAD = re.compile(rb'\s*\{\s*(?:"\w{1,64}"\s*:\s*(?:"[^"\\]{0,256}"|[\w.+-]{1,32})\s*,\s*)*"\w{1,64}"\s*:\s*\[')
_NO_CHOICE = re.compile(
    r"Invalid enum value (?P<got>.*) - at (?P<place>`\$\.(?P<field>\w+)(?:\[\.\.\.\]|\[\d+\])*`)", re.DOTALL
)
_TEXTS = msgspec.json.Decoder(list[str])


def decode(decoder: msgspec.json.Decoder[Any], body: bytes) -> Any:
    """A request from its JSON, checked against the decoder's type.

    Raises:
        ApiError: It is no JSON in UTF-8, or not of the type (422).
    """
    try:
        try:
            return decoder.decode(body)
        except msgspec.ValidationError as error:
            if "got `float`" not in str(error):
                raise
            # To JSON Schema, 3.0 is an integer.
            return msgspec.convert(_whole(msgspec.json.decode(body)), decoder.type)
    except msgspec.ValidationError as error:
        raise ApiError("invalid_request", _with_choices(str(error), decoder.type)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _malformed(str(error), body) from None


def _with_choices(message: str, kind: Any) -> str:
    """The message of msgspec, with the values that it expects of a field of a few."""
    found = _NO_CHOICE.fullmatch(message)
    if found is None:
        return message
    names = dict(zip(kind.__struct_encode_fields__, kind.__struct_fields__, strict=True))
    choices = _choices(get_type_hints(kind)[names[found["field"]]])
    return f"Expected {', '.join(choices)}, got {found['got']} - at {found['place']}"


def _choices(kind: Any) -> list[str]:
    """The values of all `Literal` in a type."""
    if get_origin(kind) is Literal:
        return [str(choice) for choice in get_args(kind)]
    return [choice for part in get_args(kind) for choice in _choices(part)]


def _whole(value: Any) -> Any:
    """The same with integers in place of floats that are whole."""
    if isinstance(value, float):
        return int(value) if value.is_integer() else value
    if isinstance(value, list):
        return [_whole(item) for item in value]
    if isinstance(value, dict):
        return {name: _whole(item) for name, item in value.items()}
    return value


def decode_in_parts(decoder: msgspec.json.Decoder[Any], body: bytes, limits: Limits) -> Any:
    """The same of a large body: the texts of its first list are decoded part by part.

    A mark stands for them in what is left, which is decoded as usual; where it turns up, they are put back.

    Raises:
        ApiError: It is no JSON in UTF-8 or not of the type (422), or holds more texts or token ids than a request may
            (413).
    """
    head = _HEAD.match(body)
    texts: list[str] = []
    mark = ""
    if head is not None:
        texts, end = _leading_texts(body, head.end(), limits)
        if texts:
            mark = f"\0{secrets.token_hex(8)}"  # No text that is allowed, and none that a client could guess.
            body = b"%s%s,%s" % (body[: head.end()], orjson.dumps(mark), body[end:])
    if len(body) > INLINE_BYTES:
        _check_values(body, limits)
    request = decode(decoder, body)
    for field in request.__struct_fields__ if texts else ():
        value = getattr(request, field)
        if isinstance(value, list) and value[:1] == [mark]:
            setattr(request, field, [*texts, *value[1:]])
    return request


def _leading_texts(body: bytes, start: int, limits: Limits) -> tuple[list[str], int]:
    """Texts of a list in JSON, and where the rest of the list begins, which is not empty.

    A quote and a comma end a text, unless they begin one or are inside of one: then the part that they end is no list
    of texts, and belongs to the rest.
    """
    texts: list[str] = []
    while len(body) - start > _PART_BYTES:
        cut = body.rfind(b'",', start, start + _PART_BYTES)
        if cut < 0:
            cut = body.find(b'",', start + _PART_BYTES)
        if cut < 0:
            break
        try:
            texts += _TEXTS.decode(b"[%s]" % body[start : cut + 1])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            break
        if len(texts) > limits.inputs:
            raise ApiError("too_large", exceeded("inputs", limits.inputs))
        start = cut + 2
        time.sleep(_GIVE_WAY_S)
    return texts, start


def _check_values(body: bytes, limits: Limits) -> None:
    """Refuses what takes long to decode and cannot be a request: values cost far more than their bytes.

    There is a comma between any two values, and lists side by side have commas between them, unlike lists in lists,
    which are refused as too deep soon.
    """
    most = limits.inputs + _SPARE_VALUES
    lists = commas = 0
    if body.count(b",") <= most:
        return
    for between in _outside_texts(body):
        lists += between.count(b"[")
        commas += between.count(b",")
        if commas > most + limits.ids or (commas > most and lists > most):
            if limits.ids and lists <= most:
                raise ApiError("too_large", exceeded("tokens", limits.ids))
            raise ApiError("too_large", exceeded("inputs", limits.inputs))


def _outside_texts(body: bytes) -> Iterator[bytes]:
    """What stands between the texts of JSON."""
    end = 0
    while (start := body.find(b'"', end)) >= 0:
        yield body[end:start]
        end = start + 1
        while (end := body.find(b'"', end)) >= 0:
            escape = end
            while body[escape - 1] == 0x5C:
                escape -= 1
            end += 1
            if (end - escape) % 2:
                break
        else:
            return
    yield body[end:]


def _malformed(message: str, body: bytes) -> ApiError:
    if not body:
        return ApiError("invalid_request", "expected one JSON object, got an empty body")
    hint = ""
    if b"\\ud" in body or b"\\uD" in body:
        hint = "; escapes from \\ud800 to \\udfff have to come in pairs"
    return ApiError("invalid_request", f"expected one JSON object in UTF-8: {message}{hint}")


def encode(body: Any) -> bytes:
    """JSON of an answer; it may hold rows of f32, and sequences that make their items when they are read."""
    return orjson.dumps(body, _plain)


def _plain(value: Any) -> Any:
    """What orjson can write of a value that it does not know."""
    return orjson.Fragment(_writer_of_rows()(value)) if isinstance(value, memoryview) else list(value)


@functools.cache
def _writer_of_rows() -> Callable[[memoryview], bytes]:
    from torch_ext.runtime import json_row  # If it cannot be imported, the engine says so.

    return json_row


class Large(NamedTuple):
    """An answer that is to be encoded in parts, on a helper thread.

    Attributes:
        body: The answer.
        key: Its field that is large, a list or an object of lists; empty: the answer is this list alone, without the
            object around it.
        values_each: About how many numbers each item of a list holds.
    """

    body: dict[str, Any]
    key: str
    values_each: int

    @property
    def values(self) -> int:
        """About how many numbers the answer holds."""
        found = self.body[self.key]
        return self.values_each * (sum(map(len, found.values())) if isinstance(found, dict) else len(found))


def encode_list(body: dict[str, Any], key: str, values_each: int) -> bytes | Large:
    """The same of an answer that may be large; see `Large`."""
    large = Large(body, key, values_each)
    return large if large.values > INLINE_VALUES else encode(body)


def encode_rows(rows: Sequence[Any], values_each: int) -> bytes | Large:
    """The same of an answer that is a list without an object around it."""
    if len(rows) * values_each > INLINE_VALUES:
        return Large({"": rows}, "", values_each)
    return encode(rows)


def text_values(texts: Sequence[str]) -> int:
    """How many numbers a text of an answer counts as, on average."""
    return sum(map(len, texts)) // (VALUE_CHARS * max(len(texts), 1))


def encode_in_parts(large: Large) -> bytes:
    """The same of a large answer."""
    found = []
    for part in parts(large):
        found.append(part)
        time.sleep(_GIVE_WAY_S)
    return b"".join(found)


def parts(large: Large) -> Iterator[bytes]:
    """The same, one part after the other; each takes a millisecond or less to make."""
    before = b"{" if large.key else b""
    for name, value in large.body.items():
        if large.key:
            before += encode(name) + b":"
        if name != large.key:
            before += encode(value) + b","
            continue
        lists = value.items() if isinstance(value, dict) else ((None, value),)
        before += b"{" if isinstance(value, dict) else b""
        for inner, items in lists:
            before += b"[" if inner is None else encode(inner) + b":["
            for piece in _pieces(items, large.values_each):
                before += piece
                if len(before) >= _PART_BYTES:
                    yield before
                    before = b""
            before += b"],"
        if isinstance(value, dict):
            before = before[:-1] + b"},"
    yield before[:-1] + (b"}" if large.key else b"")


def _pieces(items: Sequence[Any], values_each: int) -> Iterator[bytes]:
    """JSON of a list without its brackets, piece by piece; an item that is a large list itself is cut, too."""
    step = max(1, _PART_VALUES // max(values_each, 1))
    for start in range(0, len(items), step):
        comma = b"," if start else b""
        part = items[start : start + step]
        inner = part[0]
        if values_each > _PART_VALUES and isinstance(inner, Sequence) and not isinstance(inner, (str, memoryview)):
            yield comma + b"["
            yield from _pieces(inner, values_each // max(len(inner), 1))
            yield b"]"
        else:
            yield comma + encode_part(part)


def encode_part(items: Sequence[Any]) -> bytes:
    """JSON of some items of a list, without its brackets."""
    return encode(items)[1:-1]
