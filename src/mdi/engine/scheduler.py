"""The choice of sequences for the next batch, and of how many tokens of each. Pure: no torch, no clock, no I/O.

Decode goes first in every batch; prefill chunks fill the rest of its token budget. While several batches are in flight
(recurrent pipeline parallelism), each takes its share of the decoding sequences, so that every node has work.

Sequences get a slot in order of arrival, when the KV cache has memory for the tokens that are known of them. They grow
as they decode. When memory runs out, the youngest running sequence is preempted: it waits in its place in the queue,
and is computed again later.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count, islice
from operator import attrgetter
from typing import Generic, Protocol, TypeVar

from mdi.core.batch import CacheEdit
from mdi.core.status import CacheStatus
from mdi.engine.slots import Cached, Slots


class Schedulable(Cached, Protocol):
    """A sequence, as the scheduler needs it.

    in_flight: a batch that has not come back computes it. arrival: its number in the order of arrival.
    """

    in_flight: bool
    arrival: int

    @property
    def blocked(self) -> bool:
        """Whether it takes no slot yet: its media are not encoded, or another sequence computes what it will share."""

    @property
    def remaining(self) -> int:
        """Tokens that are known but not computed."""


S = TypeVar("S", bound=Schedulable)


@dataclass(frozen=True)
class ScheduledSlice(Generic[S]):
    """One sequence's part of a batch: its next `length` tokens from `start`.

    samples: whether these are all the tokens that are known, so that the next one is drawn.
    """

    sequence: S
    start: int
    length: int
    samples: bool


class Scheduler(Generic[S]):
    """Waiting and running sequences, and the slots they run in.

    n_slots: sequences that run at once. cache_tokens: tokens that the KV cache has memory for; each sequence must fit.
    token_budget: most tokens in a batch. max_in_flight: batches in the pipeline at once; at least the number of nodes
    keeps all of them busy.
    """

    prefill_budget: int
    """Most tokens of prompts in a batch while other sequences decode; `token_budget` at first."""

    def __init__(self, *, n_slots: int, cache_tokens: int, token_budget: int, max_in_flight: int) -> None:
        self.token_budget = self.prefill_budget = token_budget
        self.max_in_flight = max_in_flight
        self.in_flight = 0
        self.preemptions = 0
        self._slots: Slots[S] = Slots(n_slots, cache_tokens)
        self._arrivals = count()
        self._waiting: list[S] = []  # in order of arrival
        self._running: deque[S] = deque()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def cache(self) -> CacheStatus:
        """From any thread."""
        return CacheStatus(self._slots.used_share, self.preemptions)

    def add(self, sequences: Iterable[S]) -> None:
        """Puts sequences at the end of the queue."""
        for sequence in sequences:
            sequence.arrival = next(self._arrivals)
            self._waiting.append(sequence)

    def remove(self, sequence: S) -> None:
        """Removes a sequence and frees its slot. Not while it is in flight."""
        assert not sequence.in_flight
        if sequence.slot is None:
            self._waiting.remove(sequence)
        else:
            self._running.remove(sequence)
            self._slots.give_back(sequence)

    def schedule(self) -> list[ScheduledSlice[S]]:
        """The next batch; empty when there is nothing to do or the pipeline is full. Its sequences become in flight."""
        if self.in_flight >= self.max_in_flight:
            return []
        self._admit()
        decoding = [sequence for sequence in self._running if _decodes(sequence)]
        work = self._decode(decoding)
        left = self.token_budget - len(work)
        work += self._prefill(min(left, self.prefill_budget) if decoding else left)
        for item in work:
            self._running.remove(item.sequence)  # to the back: the longest waiting come first next time
            self._running.append(item.sequence)
        self.in_flight += bool(work)
        return work

    def finish(self, work: Iterable[ScheduledSlice[S]]) -> None:
        """A batch came back: its tokens are in the cache."""
        self.in_flight -= 1
        for item in work:
            item.sequence.in_flight = False
            item.sequence.computed = item.start + item.length

    def restart(self) -> None:
        """Forgets what is in flight and in the caches: every running sequence starts again, in its slot."""
        self.in_flight = 0
        self._slots.forget()
        for sequence in self._running:
            sequence.in_flight = False

    def take_edits(self) -> tuple[CacheEdit, ...]:
        """What the batch just scheduled does to the cache first, also for sequences that a later batch computes."""
        return self._slots.take_edits()

    def _admit(self) -> None:
        """Gives slots to waiting sequences. None passes another that waits for memory, or the latter might for ever."""
        while self._slots.free and (sequence := next((s for s in self._waiting if not s.blocked), None)):
            if not self._slots.fits(_length(sequence), spare_blocks=len(self._running)):
                break
            self._waiting.remove(sequence)
            self._slots.take(sequence)
            self._running.append(sequence)

    def _has_memory(self, sequence: S, n_tokens: int) -> bool:
        """Whether a running sequence has memory for its first tokens, if need be that of younger ones, or its own not.

        A younger one in flight keeps its memory; the sequence then waits until the batch comes back.
        """
        while sequence.slot is not None and not self._slots.grow(sequence, n_tokens):
            youngest = max(self._running, key=attrgetter("arrival"))
            if youngest.in_flight:
                return False
            self._preempt(youngest)
        return sequence.slot is not None

    def _preempt(self, sequence: S) -> None:
        self.preemptions += 1
        self._running.remove(sequence)
        self._slots.give_back(sequence)
        insort(self._waiting, sequence, key=attrgetter("arrival"))

    def _decode(self, decoding: list[S]) -> list[ScheduledSlice[S]]:
        ready = [sequence for sequence in decoding if not sequence.in_flight]
        fair = _divide_up(len(decoding), self.max_in_flight)
        left = _divide_up(len(ready), self.max_in_flight - self.in_flight)
        share = min(fair, left, self.token_budget)
        fitting = (sequence for sequence in ready if self._has_memory(sequence, _length(sequence)))
        return [self._slice(sequence, 1) for sequence in islice(fitting, share)]

    def _prefill(self, budget: int) -> list[ScheduledSlice[S]]:
        work = []
        for sequence in list(self._running):
            if budget == 0:
                break
            if sequence.in_flight or _decodes(sequence) or not self._has_memory(sequence, _length(sequence)):
                continue
            work.append(self._slice(sequence, min(sequence.remaining, budget)))
            budget -= work[-1].length
        return work

    def _slice(self, sequence: S, length: int) -> ScheduledSlice[S]:
        """The next tokens of a sequence, which is in flight from now on."""
        sequence.in_flight = True
        return ScheduledSlice(sequence, sequence.computed, length, samples=length == sequence.remaining)


def _decodes(sequence: Schedulable) -> bool:
    return sequence.remaining == 1 and sequence.computed > 0


def _length(sequence: Schedulable) -> int:
    """Tokens that are known."""
    return sequence.computed + sequence.remaining


def _divide_up(total: int, parts: int) -> int:
    return -(-total // parts)
