"""Groups whose ranks are threads of this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import permutations
from queue import SimpleQueue
from typing import Any, TypeVar

import torch
from torch import Tensor

from mdi.core.batch import Batch
from mdi.core.errors import LinkError
from mdi.core.group import Rank
from mdi.kernels.threads import compute_threads, set_threads

T = TypeVar("T")
Way = SimpleQueue[Any]
TIMEOUT_S = 20.0


def ranks_of(shares: Sequence[int]) -> list[Rank]:
    """Ranks with so many shards each, in order."""
    ends = [sum(shares[: index + 1]) for index in range(len(shares))]
    return [Rank(end - share, end, ends[-1]) for share, end in zip(shares, ends, strict=True)]


def run_ranks(ranks: Sequence[Rank], work: Callable[[ThreadGroup], T]) -> list[T]:
    """Runs `work` for each rank of a group, in a thread of its own. Returns what it gives, in the ranks' order.

    Raises the first rank's error where one fails; the others get a LinkError then.
    """
    ways = {pair: Way() for pair in permutations(range(len(ranks)), 2)}
    groups = [ThreadGroup(rank, index, ways) for index, rank in enumerate(ranks)]

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


class ThreadGroup:
    """`Group` of one rank. What it hands over is copied at once. recorded: the sums of all ranks, if it is a list.

    gathered_columns: of all ranks, so far.
    """

    def __init__(self, rank: Rank, index: int, ways: Mapping[tuple[int, int], Way]) -> None:
        """ways: from each rank to each other one, by their indices."""
        self.rank = rank
        self.recorded: list[Tensor] | None = None
        self.gathered_columns = 0
        self._leads = index == 0
        self._to = {end: way for (start, end), way in ways.items() if start == index}
        self._from = {start: way for (start, end), way in ways.items() if end == index}
        self._sent_rows: dict[int, int] = {}  # by where a tensor is
        self._received_rows: dict[int, dict[int, int]] = {}

    def lead(self, batch: Batch, hidden: Tensor) -> None:
        assert self._leads
        self._give((batch, hidden.clone()))

    def follow(self) -> tuple[Batch, Tensor]:
        assert not self._leads
        batch, hidden = _taken(self._from[0])
        return batch.without_adjustments(), hidden

    def exchange(self, partials: Tensor) -> None:
        n_rows = partials.shape[1]
        self.send(partials, slice(0, n_rows))
        self.receive(partials, n_rows)

    def send(self, partials: Tensor, rows: slice) -> None:
        place, own = partials.data_ptr(), slice(self.rank.first_shard, self.rank.last_shard)
        assert partials.is_contiguous()
        assert len(partials) == self.rank.n_shards
        if rows.start == 0:
            assert place not in self._received_rows
            self._received_rows[place] = dict.fromkeys(self._from, 0)
        else:
            assert rows.start == self._sent_rows[place]
        self._sent_rows[place] = rows.stop
        self._give((own, rows, partials[own, rows].clone()))

    def receive(self, partials: Tensor, last_row: int) -> None:
        place, n_rows = partials.data_ptr(), partials.shape[1]
        assert self._sent_rows[place] == n_rows
        received = self._received_rows[place]
        for start, way in self._from.items():
            while received[start] < last_row:
                shards, rows, sums = _taken(way)
                assert rows.start == received[start]
                partials[shards, rows] = sums
                received[start] = rows.stop
        if last_row == n_rows:
            del self._received_rows[place]
            if self.recorded is not None:
                self.recorded.append(partials.clone())

    def gather(self, columns: Tensor) -> list[Tensor] | None:
        if not self._leads:
            self._to[0].put(columns.clone())
            return None
        parts = [columns, *(_taken(way) for way in self._from.values())]
        self.gathered_columns += sum(part.shape[1] for part in parts)
        return parts

    def close(self) -> None:
        self._give(None)

    def _give(self, what: Any) -> None:
        for way in self._to.values():
            way.put(what)


def _taken(way: Way) -> Any:
    """Raises LinkError when the other rank is gone."""
    taken = way.get(timeout=TIMEOUT_S)
    if taken is None:
        raise LinkError("a rank of the group is lost")
    return taken
