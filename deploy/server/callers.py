"""Who waits for an answer, and how the work for somebody who has left is ended."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Caller", "CallerLeft"]


class CallerLeft(Exception):  # noqa: N818 - nothing went wrong
    """The client has left: there is nobody to answer."""


class Caller:
    """The client of one request.

    Attributes:
        gone: The client has left.
        on_leave: Called once when it leaves; None while nothing runs for it that could be ended.
    """

    __slots__ = ("gone", "on_leave")

    def __init__(self) -> None:
        self.gone = False
        self.on_leave: Callable[[], None] | None = None

    def leave(self) -> None:
        """The client has left; further calls do nothing."""
        if not self.gone:
            self.gone = True
            if self.on_leave is not None:
                self.on_leave()
