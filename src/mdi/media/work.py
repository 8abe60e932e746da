"""What the work on one request's media may use: memory, turns of computing, and time until its caller leaves.

Many requests fetch and decode at once, each in a thread of its own. Few of them compute at a time, and all share a
limit of memory, so that a long film delays no picture and many large files do not fill the memory.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from mdi.core.errors import MDIError

SLICE_S = 0.02  # a turn goes to the next one that waits after so long, where the work can pause


class AbandonedError(MDIError):
    """The caller of a request has left, so the work on its media ended early."""


class Turns:
    """`n` turns of computing, given in order of arrival."""

    def __init__(self, n: int) -> None:
        self._free = n
        self._waiting: deque[threading.Event] = deque()
        self._lock = threading.Lock()

    @property
    def wanted(self) -> bool:
        """Whether a thread waits for a turn."""
        return bool(self._waiting)

    def take(self) -> None:
        """Waits for a turn."""
        with self._lock:
            if self._free:
                self._free -= 1
                return
            given = threading.Event()
            self._waiting.append(given)
        given.wait()

    def give_back(self) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().set()
            else:
                self._free += 1


class Memory:
    """Bytes that the media of all requests may take together. One item above the limit is let through alone.

    The owner that has held memory for the longest never waits for more, so there is always one that ends and releases
    its memory.
    """

    def __init__(self, limit_bytes: float = math.inf) -> None:
        self._limit_bytes = limit_bytes
        self._held: dict[Work, int] = {}  # in order of their first bytes
        self._changed = threading.Condition()

    @property
    def held_bytes(self) -> int:
        return sum(self._held.values())

    def held_by(self, owner: Work) -> int:
        return self._held.get(owner, 0)

    def try_reserve(self, owner: Work, size_bytes: int) -> bool:
        """Reserves if there is room; whether there was."""
        with self._changed:
            self._held.setdefault(owner, 0)
            if fits := self._fits(owner, size_bytes):
                self._held[owner] += size_bytes
            return fits

    def reserve(self, owner: Work, size_bytes: int) -> None:
        """Waits until there is room, or until the owner is cancelled."""
        with self._changed:
            self._held.setdefault(owner, 0)
            self._changed.wait_for(lambda: owner.cancelled or self._fits(owner, size_bytes))
            self._held[owner] += size_bytes

    def keep(self, owner: Work, size_bytes: int) -> None:
        """What the owner holds from now on, in all; 0 removes it."""
        with self._changed:
            self._held[owner] = size_bytes
            if size_bytes == 0:
                del self._held[owner]
            self._changed.notify_all()

    def wake(self) -> None:
        """Lets cancelled owners end their wait."""
        with self._changed:
            self._changed.notify_all()

    def _fits(self, owner: Work, size_bytes: int) -> bool:
        return next(iter(self._held)) is owner or self.held_bytes + size_bytes <= self._limit_bytes


@dataclass(eq=False)
class Work:
    """The share of one request. Its methods but `cancel` and `release` are for the thread that does the work.

    waited_s: how long it waited for others, which counts towards no time limit.
    """

    turns: Turns = field(default_factory=lambda: Turns(1))
    memory: Memory = field(default_factory=Memory)
    waited_s: float = 0.0
    cancelled: bool = False
    _kept_bytes: int = 0
    _turn_since_s: float | None = None

    def cancel(self) -> None:
        """Makes the work end at its next check. From any thread."""
        self.cancelled = True
        self.memory.wake()

    def release(self) -> None:
        """Nothing of the media is in memory any more. From any thread."""
        self._kept_bytes = 0
        self.memory.keep(self, 0)

    def check(self) -> None:
        """Raises AbandonedError when the request is cancelled."""
        if self.cancelled:
            raise AbandonedError("the request was cancelled")

    def reserve(self, size_bytes: int) -> None:
        """Waits until that much more memory may be taken. Raises AbandonedError."""
        if not self.memory.try_reserve(self, size_bytes):
            self._pause(lambda: self.memory.reserve(self, size_bytes))
        self.check()

    @contextmanager
    def temporary(self) -> Iterator[None]:
        """What the body reserves is given back at its end."""
        before_bytes = self.memory.held_by(self)
        try:
            yield
        finally:
            self.memory.keep(self, before_bytes)

    def keep(self, size_bytes: int) -> None:
        """One image or video is ready: of all memory taken for it, this much stays in use until `release`."""
        self._kept_bytes += size_bytes
        self.memory.keep(self, self._kept_bytes)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Waits for a turn; the body may compute. Raises AbandonedError."""
        self._take_turn()
        try:
            self.check()
            yield
        finally:
            self._turn_since_s = None
            self.turns.give_back()

    def between_steps(self) -> None:
        """To be called often while computing: lets others compute after a while. Raises AbandonedError."""
        self.check()
        if self._turn_since_s and self.turns.wanted and time.monotonic() - self._turn_since_s > SLICE_S:
            self._pause(lambda: None)
            self.check()

    def _take_turn(self) -> None:
        started_s = time.monotonic()
        self.turns.take()
        self._turn_since_s = time.monotonic()
        self.waited_s += self._turn_since_s - started_s

    def _pause(self, wait: Callable[[], None]) -> None:
        """Waits without a turn of computing."""
        had_turn, started_s = self._turn_since_s is not None, time.monotonic()
        if had_turn:
            self._turn_since_s = None
            self.turns.give_back()
        try:
            wait()
            self.waited_s += time.monotonic() - started_s
        finally:
            if had_turn:
                self._take_turn()


@dataclass(frozen=True)
class Deadline:
    """When a part of a request's work must be over, on the monotonic clock. What it waits for others is not counted."""

    at_s: float
    limit_s: float
    work: Work

    @classmethod
    def after(cls, limit_s: float, work: Work) -> Deadline:
        return cls(time.monotonic() + limit_s - work.waited_s, limit_s, work)

    @property
    def left_s(self) -> float:
        """Seconds until then; 0 or less when the time is over."""
        return self.at_s + self.work.waited_s - time.monotonic()
