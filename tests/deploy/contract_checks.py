"""What `contract.py` checks by schemathesis besides its own: a request that the document allows is taken.

It may be refused by a limit that the answer names; by a model that it is not for, which the document says; and where
two of its fields do not fit each other, which no schema can say.
"""

from __future__ import annotations

import re
from typing import Any

import schemathesis

__all__ = ["named_limit"]

NAMED = re.compile(
    "sets this limit|this limit is fixed"
    "|needs a model for|reranking needs a model with one label"  # Another model.
    "|texts by its shape|texts as in text|as many contexts as|1 mask in each text"  # Tensors that fit each other.
    "|less than max_seq_len=|of max_seq_len=|beside `parameters`"
)
BUSY = (401, 429, 503)


@schemathesis.check
def named_limit(ctx: Any, response: Any, case: Any) -> None:
    """Fails where a valid request is refused for another reason.

    Args:
        ctx: Of the run.
        response: The answer.
        case: The request.

    Raises:
        AssertionError: It is.
    """
    valid = case.meta is not None and case.meta.generation.mode.is_positive
    if valid and response.status_code >= 400 and response.status_code not in BUSY and not NAMED.search(response.text):
        raise AssertionError(f"the document allows this request: {response.status_code} {response.text[:300]}")
