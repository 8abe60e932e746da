"""Links between ranks of one machine that are as slow as a network: a round trip and a rate, by the clock they share.

A rank notes when what it sends will have arrived: when the line is free of what went before, the bytes have passed at
the line's rate, and half a round trip is over. Whoever receives it waits until then. So nothing has to be moved late by
a third process, which would need a core, and be late itself; and every byte still goes through the real link. What is
not there: packets of many connections at one switch, and interrupts.

The engine of a side uses them when it is given the file of a `Line`, and so do the processes of its nodes, which run
this module instead of `mdi`. One group of one stage at a time.
"""

from __future__ import annotations

import mmap
import os
import runpy
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mdi.cluster import link as starter_link
from mdi.cluster.launchers import process
from mdi.core.batch import Batch
from mdi.core.group import Rank
from mdi.node import membership
from mdi.planning.hardware import LinkSpeed
from mdi.rpc import measure_link
from mdi.rpc.group_join import Member
from mdi.rpc.group_link import GroupLink

VARIABLE = "MDI_BENCHMARK_LINE"
RANKS, CALLS = 16, 256  # ranks are at most two tensors apart, in pieces
NUMBERS = 2 + RANKS * CALLS
SLEEP_S = 100e-6  # before the end of a longer wait: sleep ends late
FRAME_BYTES = 120  # of frame, TLS record, TCP and IP, around what is sent
BATCH_BYTES = 200  # of a decode step's header, about


class Line:
    """What all ranks share: the speed of the lines, and when what each sends arrives. In a file that they map."""

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            file.truncate(8 * NUMBERS)
            self._numbers = memoryview(mmap.mmap(file.fileno(), 8 * NUMBERS)).cast("d")

    @property
    def speed(self) -> LinkSpeed:
        """rtt_s: 0 and bytes_per_s: 0 for the machine's own."""
        return LinkSpeed(self._numbers[0], self._numbers[1])

    @speed.setter
    def speed(self, speed: LinkSpeed) -> None:
        self._numbers[0], self._numbers[1] = speed.rtt_s, speed.bytes_per_s

    def note(self, rank: int, call: int, arrives_s: float) -> None:
        self._numbers[self._place(rank, call)] = arrives_s

    def wait(self, ranks: Sequence[int], call: int) -> None:
        """Until what all of these sent has arrived."""
        until_s = max(self._numbers[self._place(rank, call)] for rank in ranks)
        while (left_s := until_s - time.monotonic()) > 0:
            time.sleep(left_s - SLEEP_S if left_s > SLEEP_S else 0)

    @staticmethod
    def _place(rank: int, call: int) -> int:
        return 2 + rank * CALLS + call % CALLS


class SlowLink(GroupLink):
    """A `GroupLink` over a line. Ranks are known by their first shards."""

    _line: Line
    _lead: int
    _others: list[int]
    _call: int  # the calls so far: all ranks make the same ones
    _pieces: dict[int, dict[int, int]]  # the call that sent it, by where the tensor is, and the piece's last row
    _free_s: float  # when this rank's line is free

    @classmethod
    def join(cls, index: int, members: Sequence[Member], shares: Sequence[Rank], *rest: Any, **named: Any) -> SlowLink:
        made = super().join(index, members, shares, *rest, **named)
        assert isinstance(made, SlowLink)
        made._line = Line(Path(os.environ[VARIABLE]))
        made._others = [share.first_shard for share in shares if share != shares[index]]
        made._lead = shares[0].first_shard
        made._call, made._free_s, made._pieces = 0, 0.0, {}
        return made

    def lead(self, batch: Batch, hidden: Tensor) -> None:
        self._note(hidden.nbytes + BATCH_BYTES)
        super().lead(batch, hidden)

    def follow(self) -> tuple[Batch, Tensor]:
        self._call += 1
        arrived = super().follow()
        self._line.wait([self._lead], self._call)
        return arrived

    def exchange(self, partials: Tensor) -> None:
        self._note(self._part_bytes(partials, slice(0, partials.shape[1])))
        super().exchange(partials)
        self._line.wait(self._others, self._call)

    def send(self, partials: Tensor, rows: slice) -> None:
        self._note(self._part_bytes(partials, rows))
        if rows.start == 0:
            self._pieces[partials.data_ptr()] = {}
        self._pieces[partials.data_ptr()][rows.stop] = self._call
        super().send(partials, rows)

    def receive(self, partials: Tensor, last_row: int) -> None:
        super().receive(partials, last_row)
        calls = self._pieces[partials.data_ptr()]
        self._line.wait(self._others, calls[min(last for last in calls if last >= last_row)])

    def _part_bytes(self, partials: Tensor, rows: slice) -> int:
        return partials[0, rows].nbytes * len(self.rank.shards)

    def gather(self, columns: Tensor) -> list[Tensor] | None:
        if not self.rank.leads:
            self._note(columns.nbytes, n_peers=1)
            return super().gather(columns)
        self._call += 1
        gathered = super().gather(columns)
        self._line.wait(self._others, self._call)
        return gathered

    def _note(self, n_bytes: int, n_peers: int | None = None) -> None:
        """Notes when all peers have what is sent now."""
        speed = self._line.speed
        self._call += 1
        sent_bytes = (n_bytes + FRAME_BYTES) * (n_peers or len(self._others))
        passing_s = sent_bytes / speed.bytes_per_s if speed.bytes_per_s else 0.0
        self._free_s = max(time.monotonic(), self._free_s) + passing_s
        self._line.note(self.rank.first_shard, self._call, self._free_s + speed.rtt_s / 2)


def use(path: Path) -> None:
    """From now on groups of this process, and of nodes that it starts, have slow links. path: of their `Line`."""
    os.environ[VARIABLE] = str(path)
    process.MODULE = __name__ if __name__ != "__main__" else "benchmarks.slow_links"
    for module in (starter_link, membership, measure_link):
        module.GroupLink = SlowLink  # type: ignore[attr-defined]


if __name__ == "__main__":
    use(Path(os.environ[VARIABLE]))
    sys.argv[0] = "mdi"
    runpy.run_module("mdi", run_name="__main__")
