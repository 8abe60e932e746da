"""Which sequences the next batch computes, and how many tokens of each. Pure: no torch, no clock, no I/O.

Decode goes first in every batch; prefill chunks fill the rest of its token budget. While several batches are in flight
(recurrent pipeline parallelism), each takes its share of the decoding sequences, so that every node has work.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from mdi.core.batch import Copy
from mdi.engine.slots import Cached, Slots


class Schedulable(Cached, Protocol):
    """What the scheduler sees of a sequence. held: it waits for another one, whose cache it will share."""

    in_flight: bool

    @property
    def held(self) -> bool: ...

    @property
    def remaining(self) -> int: ...

    @property
    def ready(self) -> bool: ...


S = TypeVar("S", bound=Schedulable)


@dataclass(frozen=True)
class Work(Generic[S]):
    """One sequence's part of a batch: its next `length` tokens from `start`. `samples` when none remain after them."""

    sequence: S
    start: int
    length: int
    samples: bool


class Scheduler(Generic[S]):
    """Waiting and running sequences, and the slots they run in.

    n_slots: sequences that run at once. token_budget: most tokens in a batch. max_in_flight: batches in the pipeline at
    once, at least the number of nodes.
    """

    prefill_budget: int
    """Most tokens of prompts in a batch while other sequences decode; at first as many as otherwise."""

    def __init__(self, *, n_slots: int, token_budget: int, max_in_flight: int) -> None:
        self.token_budget = self.prefill_budget = token_budget
        self.max_in_flight = max_in_flight
        self.in_flight = 0
        self._slots: Slots[S] = Slots(n_slots)
        self._copies: list[Copy] = []
        self._waiting: deque[S] = deque()
        self._running: deque[S] = deque()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    def add(self, sequences: Iterable[S]) -> None:
        """Puts sequences at the end of the queue."""
        self._waiting.extend(sequences)

    def remove(self, sequence: S) -> None:
        """Takes a sequence out and frees its slot. Not while it is in flight."""
        assert not sequence.in_flight
        if sequence.slot is None:
            self._waiting.remove(sequence)
        else:
            self._running.remove(sequence)
            self._slots.give_back(sequence)

    def schedule(self) -> list[Work[S]]:
        """The next batch; empty when there is nothing to do or the pipeline is full. Its sequences become in flight."""
        if self.in_flight >= self.max_in_flight:
            return []
        self._admit()
        decoding = [sequence for sequence in self._running if _decodes(sequence)]
        work = self._decode(decoding)
        left = self.token_budget - len(work)
        work += self._prefill(min(left, self.prefill_budget) if decoding else left)
        for item in work:
            item.sequence.in_flight = True
            self._running.remove(item.sequence)  # to the back: those that waited longest come first next time
            self._running.append(item.sequence)
        self.in_flight += bool(work)
        return work

    def finish(self, work: Iterable[Work[S]]) -> None:
        """A batch came back: its tokens are in the cache."""
        self.in_flight -= 1
        for item in work:
            item.sequence.in_flight = False
            item.sequence.computed = item.start + item.length

    def restart(self) -> None:
        """Nothing in flight comes back, and the caches are empty: every running sequence begins again, in its slot."""
        self.in_flight = 0
        self._copies.clear()
        self._slots.forget()
        for sequence in self._running:
            sequence.in_flight = False

    def take_copies(self) -> tuple[Copy, ...]:
        """What the batch just scheduled copies first, be it for sequences that come in a later one."""
        copies = tuple(self._copies)
        self._copies.clear()
        return copies

    def _admit(self) -> None:
        while self._slots.free and (sequence := next((s for s in self._waiting if not s.held), None)):
            self._waiting.remove(sequence)
            if copy := self._slots.take(sequence):
                self._copies.append(copy)
            self._running.append(sequence)

    def _decode(self, decoding: list[S]) -> list[Work[S]]:
        ready = [sequence for sequence in decoding if sequence.ready]
        fair = _divide_up(len(decoding), self.max_in_flight)
        left = _divide_up(len(ready), self.max_in_flight - self.in_flight)
        share = min(fair, left, self.token_budget)
        return [Work(sequence, sequence.computed, 1, samples=True) for sequence in ready[:share]]

    def _prefill(self, budget: int) -> list[Work[S]]:
        work = []
        for sequence in self._running:
            if budget == 0:
                break
            if not sequence.ready or _decodes(sequence):
                continue
            length = min(sequence.remaining, budget)
            work.append(Work(sequence, sequence.computed, length, samples=length == sequence.remaining))
            budget -= length
        return work


def _decodes(sequence: Schedulable) -> bool:
    return sequence.remaining == 1 and sequence.computed > 0


def _divide_up(total: int, parts: int) -> int:
    return -(-total // parts)
