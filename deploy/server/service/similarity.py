"""How alike texts are: cosines of their embeddings."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

from ..errors import ApiError
from ..limits.bounds import Limits
from ..limits.callers import Caller
from .request import Result
from .service import Service

__all__ = ["similarity"]

_INLINE_TEXTS = 64


async def similarity(
    service: Service, source: str, texts: Sequence[str], caller: Caller, limits: Limits, **options: Any
) -> Result:
    """Cosines between one text and others.

    Args:
        service: The model.
        source: The one.
        texts: The others.
        caller: Who waits.
        limits: Of the route.
        options: Those of `Service.embed`.

    Returns:
        Per text of `texts` its cosine with `source`, from -1 to 1.

    Raises:
        ApiError: There are no texts; see `Service.embed`.
        CallerLeft: The client has left.
    """
    if not texts:
        raise ApiError("no_inputs", "expected at least one sentence to compare with, got an empty list")
    result = await service.embed([source, *texts], caller, limits, normalize=True, **options)
    if len(texts) <= _INLINE_TEXTS:
        cosines = _cosines(result.values)
    else:
        cosines = await service.aside(_cosines, result.values)
    return result._replace(values=cosines)


def _cosines(rows: Sequence[Any]) -> list[float]:
    first, *others = (row.tolist() for row in rows)
    return [math.fsum(map(operator.mul, first, other)) for other in others]
