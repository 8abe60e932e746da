"""Wakes waiting tasks of an event loop from other threads: all of one step of the engine with one call to the loop."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import ClassVar
from weakref import WeakKeyDictionary


class Wakes:
    """The tasks of one event loop that wait for pieces. A call to a loop from another thread is a system call."""

    _all: ClassVar[WeakKeyDictionary[asyncio.AbstractEventLoop, Wakes]] = WeakKeyDictionary()

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._due = deque[asyncio.Future[None]]()
        self._called = False

    @classmethod
    def of(cls, loop: asyncio.AbstractEventLoop) -> Wakes:
        """The one of a loop. Call it in the loop."""
        if loop not in cls._all:
            cls._all[loop] = cls(loop)
        return cls._all[loop]

    def wake(self, waiter: asyncio.Future[None]) -> None:
        """Ends a wait. From any thread."""
        self._due.append(waiter)
        if not self._called:  # otherwise the loop has yet to look, and will find this one
            self._called = True
            self.loop.call_soon_threadsafe(self._wake_all)

    def _wake_all(self) -> None:
        self._called = False  # first: what comes from now on calls again
        while self._due:
            waiter = self._due.popleft()
            if not waiter.done():
                waiter.set_result(None)
