"""Who may ask, and how much: API keys, and what each may send and have computed in a minute.

A key has two budgets, of requests and of tokens, that fill up evenly. A request that there is nothing left for is
refused with the time after which there will be. What was refused or failed afterwards is given back.
"""

from __future__ import annotations

import hmac
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence

from ...keys import PREFIX_CHARS, Key, digest_of
from ..errors import ApiError
from .meters import Meters

__all__ = ["Keys", "Payer"]

log = logging.getLogger("deploy.server")

_TELL_S = 60.0


class Payer:
    """Whose budget a request takes from.

    Attributes:
        prefix: First characters of the key, by which logs name it.
    """

    __slots__ = ("_meters", "_place", "_requests", "_tokens", "_told_s", "digest", "prefix")

    def __init__(self, key: Key, meters: Meters) -> None:
        self.prefix = key.prefix
        self.digest = key.digest
        self._requests = key.requests_per_minute
        self._tokens = key.tokens_per_minute
        self._meters = meters
        limited = self._requests is not None or self._tokens is not None
        self._place = meters.place(key.digest) if limited else -1
        self._told_s = -math.inf

    def request(self) -> None:
        """Takes a request.

        Raises:
            ApiError: There is none left (429).
        """
        if self._requests is not None:
            self._refuse(self._meters.take(self._place, 0, 1, self._requests), "requests", self._requests)

    def tokens(self, count: int) -> None:
        """Takes tokens, before they are computed.

        Raises:
            ApiError: There are not enough left (429).
        """
        if self._tokens is not None:
            self._refuse(self._meters.take(self._place, 1, count, self._tokens), "tokens", self._tokens)

    def give_back(self, count: int) -> None:
        """Gives tokens back that were not computed."""
        if self._tokens is not None:
            self._meters.take(self._place, 1, -count, self._tokens)

    def _refuse(self, wait_s: float, what: str, per_minute: int) -> None:
        if wait_s <= 0.0:
            return
        if time.monotonic() - self._told_s > _TELL_S:
            self._told_s = time.monotonic()
            log.warning("key %s has used up its %d %s a minute", self.prefix, per_minute, what)
        raise ApiError(
            "rate_limit_exceeded",
            f"this API key may use {per_minute} {what} a minute, and the next are there in {wait_s:.1f} s",
            {"Retry-After": str(math.ceil(wait_s))},
        )


class Keys:
    """The keys that are let in."""

    def __init__(self, keys: Sequence[Key], plain: str | None, meters: Meters) -> None:
        """Reads no file; see `deploy.keys`.

        Args:
            keys: Of the file.
            plain: A key without limits; None: there is none.
            meters: Where budgets are counted.

        Raises:
            OverflowError: See `Meters.place`.
        """
        self._plain = None if plain is None else digest_of(plain.encode())
        self._payers = {key.prefix.encode(): Payer(key, meters) for key in keys}

    def admit(self, headers: Mapping[bytes, bytes]) -> Payer | None:
        """Checks who asks, and takes a request from the budget.

        Every key is looked up by its prefix, which is no secret, and compared by its hash, in constant time.

        Returns:
            Who pays; None: nobody has to.

        Raises:
            ApiError: The key is missing or wrong (401), or has nothing left (429).
        """
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        key = key.strip()
        digest = digest_of(key)
        payer = self._payers.get(key[:PREFIX_CHARS])
        known = hmac.compare_digest(digest, _NOBODY if payer is None else payer.digest)
        plain = hmac.compare_digest(digest, _NOBODY if self._plain is None else self._plain)
        if scheme.lower() != b"bearer" or not (known or plain):
            raise ApiError(
                "unauthorized", "expected the header Authorization: Bearer <API key>", {"WWW-Authenticate": "Bearer"}
            )
        if not known or payer is None:
            return None
        payer.request()
        return payer


_NOBODY = os.urandom(32)
"""The hash of no key that anybody has."""
