"""What the supervisor waits for: descriptors, times and signals, in one thread."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import select
import selectors
import signal
import socket
import time
from collections import deque
from collections.abc import Callable
from typing import Any

__all__ = ["Events"]


class Events:
    """Calls what is due."""

    def __init__(self, on_signal: Callable[[int], None]) -> None:
        """Waits for nothing yet.

        Args:
            on_signal: Called with the number of a signal, not within its handler.
        """
        self._on_signal = on_signal
        self._selector = selectors.DefaultSelector()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._signals: list[int] = []
        self._calls: deque[Callable[[], None]] = deque()

    def catch(self, *numbers: int) -> None:
        """Takes signals from now on; in the main thread."""
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setblocking(False)
        self._ends = (ours, theirs)
        signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        for number in numbers:
            signal.signal(number, lambda found, frame: self._signals.append(found))
        self.watch(ours, lambda: ours.recv(4096))

    def call_soon(self, call: Callable[[], None]) -> None:
        """Calls once, soon; for other threads."""
        self._calls.append(call)
        with contextlib.suppress(BlockingIOError):  # It will wake up anyway.
            self._ends[1].send(b"\0")

    def watch(self, sock: socket.socket | select.epoll, call: Callable[[], Any]) -> None:
        """Calls when there is something to read."""
        self._selector.register(sock, selectors.EVENT_READ, call)

    def forget(self, sock: socket.socket) -> None:
        """Ends `watch`."""
        self._selector.unregister(sock)

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        """Calls once, later."""
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._order), call))

    def wait(self) -> None:
        """Waits until something is due, and calls it."""
        timeout_s = max(self._timers[0][0] - time.monotonic(), 0.0) if self._timers else None
        for key, _ in self._selector.select(0.0 if self._signals else timeout_s):
            with contextlib.suppress(BlockingIOError):
                key.data()
        while self._signals:
            self._on_signal(self._signals.pop(0))
        while self._calls:
            self._calls.popleft()()
        while self._timers and self._timers[0][0] <= time.monotonic():
            heapq.heappop(self._timers)[2]()
