"""Who waits for an answer, what that holds, and how the work for somebody who has left is ended."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .keys import Payer

__all__ = ["Caller", "CallerLeft"]


class CallerLeft(Exception):  # noqa: N818 - nothing went wrong
    """The client has left: there is nobody to answer."""


class Caller:
    """The client of one request.

    Attributes:
        gone: The client has left.
        on_leave: Called once when it leaves; None while nothing runs for it that could be ended.
        deadline_s: When the client stops waiting, as its request says, by `time.perf_counter`; None: never.
        held_bytes: Memory that the request holds of the budget.
        values_each: Numbers that the answer to each of its inputs has, by its route.
        value_bytes: Memory that one of them holds until it is sent.
        result: What the model answered, once it has; times and tokens are told of it.
        payer: Whose API key it is, if that has budgets or a name.
        refused: The answer is an error.
    """

    __slots__ = (
        "_charged",
        "deadline_s",
        "gone",
        "held_bytes",
        "on_leave",
        "payer",
        "refused",
        "result",
        "value_bytes",
        "values_each",
    )

    def __init__(self) -> None:
        self.gone = False
        self.deadline_s: float | None = None
        self.on_leave: Callable[[], None] | None = None
        self.held_bytes = 0
        self.values_each = 0
        self.value_bytes = 4
        self.result: Any = None
        self.payer: Payer | None = None
        self.refused = False
        self._charged = 0

    def charge(self, tokens: int) -> None:
        """Takes tokens from the budget of its API key, before they are computed.

        Raises:
            ApiError: There are not enough left (429).
        """
        if self.payer is not None:
            self.payer.tokens(tokens)
            self._charged += tokens

    def refund(self) -> None:
        """Gives back what was charged for an answer that is an error."""
        if self.payer is not None and self._charged:
            self.payer.give_back(self._charged)
            self._charged = 0

    def leave(self) -> None:
        """The client has left; further calls do nothing."""
        if not self.gone:
            self.gone = True
            if self.on_leave is not None:
                self.on_leave()
