"""Cost per million texts, from prices that the user gives: this repository knows no prices."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtest.options import CannotStartError, why

__all__ = ["Price", "cost_per_million", "read_prices"]

_HOUR_S = 3600
_MOST = 1e9
"""Of any currency, for an hour."""


@dataclass(frozen=True)
class Price:
    """What a machine costs.

    Attributes:
        instance: Its name.
        per_hour: Price of an hour.
        currency: In which.
        note: Where the price is from, and when.
    """

    instance: str
    per_hour: float
    currency: str
    note: str = ""


def read_prices(path: str | Path) -> list[Price]:
    """Reads a file of prices: ``{"currency": "USD", "instances": {"NAME": {"per_hour": NUMBER, "note": "..."}}}``.

    Args:
        path: The user's file, made from ``loadtest/prices.example.json``.

    Raises:
        CannotStartError: It cannot be read, or a price is missing or no positive number.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise CannotStartError(f"--prices: cannot read {path}: {why(error)}") from error
    instances = found.get("instances") if isinstance(found, dict) else None
    if not isinstance(instances, dict) or not instances:
        raise CannotStartError(
            f'--prices: expected "currency" and "instances" in {path}, as in loadtest/prices.example.json'
        )
    currency = found.get("currency")
    if not isinstance(currency, str) or not currency.strip():
        raise CannotStartError(f'--prices: expected "currency" in {path}, such as "USD", got {currency!r}')
    return [_price(name, value, currency, path) for name, value in instances.items()]


def _price(name: str, value: Any, currency: str, path: str | Path) -> Price:
    per_hour = value.get("per_hour") if isinstance(value, Mapping) else None
    if isinstance(per_hour, bool) or not isinstance(per_hour, (int, float)) or not 0 < per_hour < _MOST:
        raise CannotStartError(
            f"--prices: expected the price of an hour of {name} in {path}, a number above 0, got {per_hour!r}. Prices "
            "are yours to fill in: they differ by region, contract and day"
        )
    return Price(name, float(per_hour), currency, str(value.get("note", "")))


def cost_per_million(price: Price, texts_per_s: float) -> float | None:
    """What a million texts cost on a machine that is busy all the time, or None if it did none."""
    return price.per_hour / _HOUR_S / texts_per_s * 1e6 if texts_per_s > 0 else None
