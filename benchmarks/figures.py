"""Figures of a benchmark: measured, compared, judged by a target, printed as a table and written as JSON."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

console = Console(width=150)


@dataclass(frozen=True)
class Figure:
    """One result. ratio: what the target is for; None where there is nothing to compare with.

    target: the least that the ratio should be; the most, if `at_most`. None: it is only reported.
    """

    format: str
    work: str
    here: str
    against: str = ""
    ratio: float | None = None
    target: float | None = None
    at_most: bool = False

    @property
    def verdict(self) -> str:
        """The target and whether it is met."""
        if self.target is None or self.ratio is None:
            return ""
        met = self.ratio <= self.target if self.at_most else self.ratio >= self.target
        return f"{'at most ' if self.at_most else ''}{self.target:g} {'met' if met else 'MISSED'}"

    @property
    def cells(self) -> tuple[str, ...]:
        """For the table."""
        ratio = "" if self.ratio is None else f"{self.ratio:.2f}"
        return self.format, self.work, self.here, self.against, ratio, self.verdict


def report(figures: Iterable[Figure], title: str, file: Path | None = None) -> None:
    """Prints each figure as it comes, then all as a table; writes them into a JSON file, if one is given."""
    table = Table("type", "work", "here", "against", "ratio", "target", title=title)
    found = list[Figure]()
    for figure in figures:
        console.print(" | ".join(figure.cells), highlight=False)
        table.add_row(*figure.cells)
        found.append(figure)
    console.print(table)
    if file:
        file.write_text(json.dumps({"title": title, "figures": [asdict(figure) for figure in found]}, indent=1) + "\n")


def in_turns(calls: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What the calls return in each round, one call after the other. A first round is not counted."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for counted in [False] + [True] * rounds:
        for name, call in calls.items():
            value = call()
            if counted:
                found[name].append(value)
    return found


def timed(call: Callable[[], object]) -> Callable[[], float]:
    """The seconds of a call, as a call."""

    def seconds() -> float:
        started_s = time.perf_counter()
        call()
        return time.perf_counter() - started_s

    return seconds


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The median of the rounds' ratios: what slows a whole round down does not count."""
    return median(a / b for a, b in zip(above, below, strict=True))


def machine() -> str:
    """The CPU's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
