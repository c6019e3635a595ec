"""Time for the generator: an alarm that is exact to some microseconds, where asyncio's own is to a millisecond."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import time
from collections.abc import Callable
from typing import Protocol

__all__ = ["Alarm", "Clock", "LoopClock"]

_NANOSECONDS = 1_000_000_000
_ABSOLUTE = 1  # TFD_TIMER_ABSTIME


class Alarm(Protocol):
    """Calls a function at a time that can be set again and again."""

    def set(self, when_s: float) -> None:
        """Sets the time, in seconds of the clock; a time that has passed is now."""

    def close(self) -> None:
        """Never rings again."""


class Clock(Protocol):
    """A clock, real or simulated."""

    def time(self) -> float:
        """Seconds since some moment in the past."""

    def alarm(self, ring: Callable[[], None]) -> Alarm:
        """An alarm that is not set yet."""


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _Itimerspec(ctypes.Structure):
    _fields_ = (("interval", _Timespec), ("value", _Timespec))


class _KernelAlarm:
    """A timer of Linux (timerfd), which the event loop watches like a socket.

    epoll waits for whole milliseconds, rounded up: with `call_at` half of them would be missing from the schedule.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, ring: Callable[[], None]) -> None:
        self._library = ctypes.CDLL(None, use_errno=True)
        self._loop = loop
        self._ring = ring
        self._number = self._library.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self._number < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        loop.add_reader(self._number, self._read)

    def _read(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._number, 8)
            self._ring()

    def set(self, when_s: float) -> None:
        seconds, nanoseconds = divmod(max(1, int(when_s * _NANOSECONDS)), _NANOSECONDS)
        value = _Itimerspec(_Timespec(0, 0), _Timespec(seconds, nanoseconds))
        if self._library.timerfd_settime(self._number, _ABSOLUTE, ctypes.byref(value), None):
            raise OSError(ctypes.get_errno(), "timerfd_settime")

    def close(self) -> None:
        if self._number >= 0:
            self._loop.remove_reader(self._number)
            os.close(self._number)
            self._number = -1


class _LoopAlarm:
    """asyncio's own timer, for systems without timerfd."""

    def __init__(self, loop: asyncio.AbstractEventLoop, ring: Callable[[], None]) -> None:
        self._loop = loop
        self._ring = ring
        self._handle: asyncio.TimerHandle | None = None

    def set(self, when_s: float) -> None:
        self.close()
        self._handle = self._loop.call_at(when_s, self._ring)

    def close(self) -> None:
        if self._handle is not None:
            self._handle.cancel()


class LoopClock:
    """The clock of an event loop, which is `time.monotonic`."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def time(self) -> float:
        """Seconds of the monotonic clock."""
        return time.monotonic()

    def alarm(self, ring: Callable[[], None]) -> Alarm:
        """An exact alarm where the system has one."""
        try:
            return _KernelAlarm(self._loop, ring)
        except (AttributeError, OSError, NotImplementedError):
            return _LoopAlarm(self._loop, ring)
