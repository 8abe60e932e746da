"""What an exchange of partial sums costs between the ranks of a group, against bare sockets that spin.

    python -m benchmarks.exchange                 # 2, 3 and 4 ranks, encrypted and plain, spinning and not; in a step
    python -m benchmarks.exchange --rounds 200    # the short mode
    python -m benchmarks.exchange --json FILE

Each rank is a process on loopback; two ranks have a core each where there are two. Bare and real exchanges alternate
over the same connections, in blocks, so that what else the machine does meets both alike: look at the ratio.

An exchange lasts from when the last rank begins it until the last one has it. "In a step" each rank reads 14 MB of
memory before each, as a step of the 2B in int4 reads weights: exchanges then take several times as long. Where ranks
begin more than 1 ms apart, other work had taken a core, and the exchange does not count.
"""

from __future__ import annotations

import argparse
import json
import math
import mmap
import multiprocessing
import os
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import cycle
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from mdi.core.group import Rank
from mdi.rpc.authority import Authority
from mdi.rpc.group_join import LinkListener, Member
from mdi.rpc.group_link import SPIN_S, GroupLink
from mdi.rpc.peer import WOULD_BLOCK
from mdi.rpc.tls import Identity

NAMES = ("starter", "secondary0", "secondary1", "finisher")
SIZES = {"6 kB": 3072, "48 kB": 24_576, "6 MB": 3_072_000}  # numbers of bfloat16 that a rank sends to each other one
BLOCKS = 10
IN_STEP = {"6 kB": 3072}
WEIGHT_BYTES, WEIGHT_PARTS = 14_000_000, 8  # read before an exchange; so many in turn, more than most caches hold
APART_S = 1e-3
LARGE_BYTES = 1_000_000  # of such messages a hundredth as many, and no bare ones, which would block both sides


@dataclass(frozen=True)
class Case:
    """One way to exchange."""

    n_ranks: int
    encrypted: bool
    spins: bool
    in_step: bool = False


Times = list[tuple[float, float]]
"""When a rank began each exchange, and when it had it."""


@dataclass(frozen=True)
class Row:
    """Seconds of an exchange. bare_s: the median of the bare sockets; of two ranks only. counted: a part of all."""

    case: Case
    size: str
    n_bytes: int
    median_s: float
    slow_s: float
    bare_s: float | None
    counted: float


CASES = [
    Case(n_ranks, encrypted, spins)
    for n_ranks, encrypted, spins in (
        (2, True, True),
        (2, True, False),
        (2, False, True),
        (2, False, False),
        (3, True, False),
        (4, True, False),
    )
]
CASES += [Case(2, True, True, in_step=True), Case(2, False, True, in_step=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2000, help="small exchanges; a hundredth as many large ones")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    rows = [row for case in CASES for row in measure(case, options.rounds)]
    report(rows)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


def measure(case: Case, rounds: int) -> list[Row]:
    """All sizes, one way."""
    spawn, authority = multiprocessing.get_context("spawn"), Authority.create()
    pipes, processes = list[Connection](), []
    for index in range(case.n_ranks):
        here, there = spawn.Pipe()
        identity = authority.issue(NAMES[index]) if case.encrypted else None
        processes.append(spawn.Process(target=run_rank, args=(case, index, identity, there, rounds), daemon=True))
        pipes.append(here)
        processes[-1].start()
    members = [Member(name, "127.0.0.1", pipe.recv()) for name, pipe in zip(NAMES, pipes, strict=False)]
    for pipe in pipes:
        pipe.send(members)
    of_ranks: list[dict[str, list[Times]]] = [pipe.recv() for pipe in pipes]
    for process in processes:
        process.join()
    return [row_of(case, size, [of_rank[size] for of_rank in of_ranks]) for size in of_ranks[0]]


def row_of(case: Case, size: str, of_ranks: list[list[Times]]) -> Row:
    """of_ranks: the times of each way, of each rank."""
    apart_s = APART_S if case.in_step else math.inf
    ways = [together([times[way] for times in of_ranks], apart_s) for way in range(len(of_ranks[0]))]
    ours = ways[0]
    bare_s = statistics.median(ways[1]) if len(ways) > 1 else None
    counted = len(ours) / len(of_ranks[0][0])
    return Row(case, size, 2 * SIZES[size], statistics.median(ours), ours[len(ours) * 99 // 100], bare_s, counted)


def together(of_ranks: list[Times], apart_s: float) -> list[float]:
    """Seconds of the exchanges that ranks began together, in order. The clock is the machine's: ranks share it."""
    seconds = []
    for times in zip(*of_ranks, strict=True):
        began, ended = zip(*times, strict=True)
        if max(began) - min(began) < apart_s:
            seconds.append(max(ended) - max(began))
    return sorted(seconds) or [math.nan]


def run_rank(case: Case, index: int, identity: Identity | None, pipe: Connection, rounds: int) -> None:
    """One rank, in its own process."""
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) >= case.n_ranks:
        os.sched_setaffinity(0, {cores[index]})
    listener = LinkListener(identity, "127.0.0.1") if index else None
    pipe.send(listener.port if listener else 0)
    members: list[Member] = pipe.recv()
    shares = [Rank(number, number + 1, case.n_ranks) for number in range(case.n_ranks)]
    link = GroupLink.join(index, members, shares, listener, identity, 1, 30.0)
    link._spin_s = SPIN_S if case.spins else 0.0
    sizes, before = (IN_STEP, Weights().read) if case.in_step else (SIZES, lambda: None)
    pipe.send({size: measure_size(link, case, n_values, rounds, before) for size, n_values in sizes.items()})
    link.exchange(torch.zeros(case.n_ranks, 1, 1))  # all are done
    link.close()


def measure_size(link: GroupLink, case: Case, n_values: int, rounds: int, before: Callable[[], None]) -> list[Times]:
    """Of our exchanges, and of bare ones. before: called before each."""
    partials = torch.zeros(case.n_ranks, 1, n_values, dtype=torch.bfloat16)
    n_bytes = 2 * n_values
    count = max(1, (rounds if n_bytes < LARGE_BYTES else rounds // 100) // BLOCKS)

    def exchange() -> None:
        link.exchange(partials)

    ways: list[Callable[[], None]] = [exchange]
    if case.n_ranks == 2 and n_bytes < LARGE_BYTES:
        ways.append(BareExchange(link._peers[0]._connection, n_bytes))
    of_ways: list[Times] = [[] for _ in ways]
    for block in range(BLOCKS + 1):
        for way, times in zip(ways, of_ways, strict=True):
            for _ in range(count):
                before()
                began_s = time.perf_counter()
                way()
                if block:  # the first one warms up
                    times.append((began_s, time.perf_counter()))
    return of_ways


class Weights:
    """Memory in huge pages, as weights lie in them, of which the next part is read in turn."""

    def __init__(self) -> None:
        memory = mmap.mmap(-1, WEIGHT_PARTS * WEIGHT_BYTES)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        self._parts = cycle(torch.frombuffer(memory, dtype=torch.int64).fill_(1).chunk(WEIGHT_PARTS))

    def read(self) -> None:
        next(self._parts).max()


class BareExchange:
    """Two loops around a socket that does not block: what any exchange needs at least."""

    def __init__(self, connection: socket.socket, n_bytes: int) -> None:
        self._connection = connection
        self._out = memoryview(bytes(n_bytes))
        self._in = memoryview(bytearray(n_bytes))

    def __call__(self) -> None:
        left, wanted = self._out, self._in
        while left or wanted:
            for operation in ("send", "recv_into"):
                part = left if operation == "send" else wanted
                if not part:
                    continue
                try:
                    n_bytes = getattr(self._connection, operation)(part)
                except WOULD_BLOCK:
                    continue
                if operation == "send":
                    left = left[n_bytes:]
                else:
                    wanted = wanted[n_bytes:]


def report(rows: list[Row]) -> None:
    console = Console(width=120)
    table = Table(
        "ranks", "TLS", "spins", "in a step", "message", "median, ms", "99 of 100, ms", "bare, ms", "to bare", "GB/s"
    )
    table.title = "an exchange between ranks on loopback"
    for row in rows:
        table.add_row(
            str(row.case.n_ranks),
            "yes" if row.case.encrypted else "no",
            "yes" if row.case.spins else "no",
            f"yes, {row.counted:.0%} counted" if row.case.in_step else "no",
            row.size,
            f"{row.median_s * 1e3:.3f}",
            f"{row.slow_s * 1e3:.3f}",
            f"{row.bare_s * 1e3:.3f}" if row.bare_s else "",
            f"{row.median_s / row.bare_s:.2f}x" if row.bare_s else "",
            f"{row.n_bytes / row.median_s / 1e9:.2f}",
        )
    console.print(table)


if __name__ == "__main__":
    main()
