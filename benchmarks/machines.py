"""What `mdi plan` would measure of nodes of one core each on this machine: their speeds, and the link between two.

Two cores share a memory bus, or are one physical core, so each is slower while the other computes, too.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import slow_links
from benchmarks.formats import Format
from mdi.kernels.threads import set_threads
from mdi.planning.hardware import LinkSpeed, Machine, measure_speed
from mdi.rpc import measure_link
from mdi.rpc.authority import Authority
from mdi.rpc.group_join import Member
from mdi.rpc.tls import Identity

TIMES = 3
NAMES = ("starter", "finisher")


@dataclass(frozen=True)
class Speeds:
    """Of a node of one core: while the other core is idle, and while it does the same."""

    alone: Machine
    together: Machine


class Pair:
    """Two processes of one core each; of one core together, where there is only one."""

    def __init__(self, pipes: list[Connection]) -> None:
        self._pipes = pipes

    def speeds(self, format_: Format, dtype: str) -> Speeds:
        """Medians of some measurements."""
        work = ("cpu", dtype, format_.quantization.layers)
        alone = [self._ask("speed", *work, nodes=(0,)) for _ in range(TIMES)]
        together = [self._ask("speed", *work) for _ in range(TIMES)]
        return Speeds(_machine(alone), _machine(together))

    def link(self) -> LinkSpeed:
        """As nodes measure it, encrypted."""
        [port] = self._ask("listen", nodes=(1,))
        speed: LinkSpeed = self._ask("connect", port, nodes=(0,))[0]
        return speed

    def _ask(self, name: str, *arguments: Any, nodes: tuple[int, ...] = (0, 1)) -> list[Any]:
        for node in nodes:
            self._pipes[node].send((name, arguments))
        return [self._pipes[node].recv() for node in nodes]


@contextmanager
def pair(line: Path) -> Iterator[Pair]:
    """line: the file of the `slow_links.Line` between them."""
    spawn, authority = multiprocessing.get_context("spawn"), Authority.create()
    cores = sorted(os.sched_getaffinity(0))
    pipes = list[Connection]()
    for name, core in zip(NAMES, (cores[0], cores[-1]), strict=True):
        here, there = spawn.Pipe()
        spawn.Process(target=_node, args=(core, line, authority.issue(name), there), daemon=True).start()
        pipes.append(here)
    try:
        yield Pair(pipes)
    finally:
        for pipe in pipes:
            pipe.close()


def _node(core: int, line: Path, identity: Identity, pipe: Connection) -> None:
    os.sched_setaffinity(0, {core})
    set_threads(1, "cpu")
    slow_links.use(line)
    starter, finisher = NAMES

    def listen() -> int:
        return measure_link.listen(finisher, starter, ("127.0.0.1", 0), identity)

    def connect(port: int) -> LinkSpeed:
        return measure_link.measure_link(starter, Member(finisher, "127.0.0.1", port), identity)

    calls: dict[str, Callable[..., Any]] = {"speed": measure_speed, "listen": listen, "connect": connect}
    while True:
        try:
            name, arguments = pipe.recv()
        except EOFError:
            return
        pipe.send(calls[name](*arguments))


def _machine(measured: list[list[tuple[float, float]]]) -> Machine:
    """The median node, over all measurements."""
    reads, multiplies = zip(*(speed for speeds in measured for speed in speeds), strict=True)
    return Machine(median(reads), median(multiplies))
