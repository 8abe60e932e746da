"""Groups whose ranks are threads of this process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from mdi.core.batch import Batch
from mdi.core.errors import LinkError
from mdi.core.group import Rank
from mdi.kernels.threads import compute_threads, set_threads

T = TypeVar("T")
TIMEOUT_S = 20.0


def ranks_of(shares: Sequence[int]) -> list[Rank]:
    """Ranks with so many shards each, in order."""
    ends = [sum(shares[: index + 1]) for index in range(len(shares))]
    return [Rank(end - share, end, ends[-1]) for share, end in zip(shares, ends, strict=True)]


def run_ranks(ranks: Sequence[Rank], work: Callable[[ThreadGroup], T]) -> list[T]:
    """Runs `work` for each rank of a group, in a thread of its own. Returns what it gives, in the ranks' order.

    Raises the first rank's error where one fails; the others get a LinkError then.
    """
    meeting = Meeting(len(ranks))
    groups = [ThreadGroup(rank, index, meeting) for index, rank in enumerate(ranks)]

    def run(group: ThreadGroup) -> T:
        try:
            return work(group)
        except BaseException:
            group.close()
            raise

    with one_thread(), ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(run, groups))


@contextmanager
def one_thread() -> Iterator[None]:
    """Kernels compute with one thread meanwhile: calls from several threads take turns otherwise, and cannot wait for
    each other."""
    before = compute_threads()
    set_threads(1, "cpu")
    try:
        yield
    finally:
        set_threads(before, "cpu")
        torch.set_num_threads(1)


@dataclass
class Meeting:
    """Where the ranks of a group meet. given: by each rank, what the others take."""

    n_ranks: int
    barrier: threading.Barrier = field(init=False)
    given: list[list[tuple[slice, Tensor]]] = field(init=False)
    batch: tuple[Batch, Tensor] | None = None

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.n_ranks, timeout=TIMEOUT_S)
        self.given = [[] for _ in range(self.n_ranks)]

    def wait(self) -> None:
        try:
            self.barrier.wait()
        except threading.BrokenBarrierError:
            raise LinkError("a rank of the group is lost") from None


class ThreadGroup:
    """`Group` of one rank. What it hands over is copied at once. recorded: the sums of all ranks, if it is a list.

    gathered_columns: of all ranks, so far.
    """

    def __init__(self, rank: Rank, index: int, meeting: Meeting) -> None:
        self.rank = rank
        self.recorded: list[Tensor] | None = None
        self.gathered_columns = 0
        self._index = index
        self._meeting = meeting

    def lead(self, batch: Batch, hidden: Tensor) -> None:
        assert self._index == 0
        self._meeting.batch = batch, hidden
        self._meeting.wait()
        self._meeting.wait()

    def follow(self) -> tuple[Batch, Tensor]:
        assert self._index > 0
        self._meeting.wait()
        assert self._meeting.batch
        batch, hidden = self._meeting.batch
        hidden = hidden.clone()
        self._meeting.wait()
        return batch.without_adjustments(), hidden

    def exchange(self, partials: Tensor, rows: slice) -> None:
        given, own = self._meeting.given[self._index], self.rank.shards
        assert partials.is_contiguous()
        assert len(partials) == self.rank.n_shards
        assert rows.start == (given[-1][0].stop if given else 0) < rows.stop
        given.append((rows, partials[own.start : own.stop, rows].clone()))
        if rows.stop < partials.shape[1]:
            return
        first = 0
        for pieces in self._shared():
            for piece, sums in pieces:
                if first != own.start:
                    partials[first : first + len(sums), piece] = sums
            first += len(pieces[0][1])
        if self.recorded is not None:
            self.recorded.append(partials.clone())
        self._done()

    def gather(self, columns: Tensor) -> list[Tensor] | None:
        self._meeting.given[self._index].append((slice(len(columns)), columns.clone()))
        parts = [pieces[0][1] for pieces in self._shared()]
        self.gathered_columns += sum(part.shape[1] for part in parts)
        self._done()
        return parts if self._index == 0 else None

    def close(self) -> None:
        self._meeting.barrier.abort()

    def _shared(self) -> list[list[tuple[slice, Tensor]]]:
        self._meeting.wait()
        return [list(pieces) for pieces in self._meeting.given]

    def _done(self) -> None:
        self._meeting.wait()
        self._meeting.given[self._index].clear()
