"""What commands show: the two consoles, progress bars, the start-up display and the table of nodes.

No text is read as markup, so names and answers appear as they are; colours are given as styles.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from mdi.cli.logs import LINES, logs_json
from mdi.core.quantization import described
from mdi.core.tables import UncutTable

if TYPE_CHECKING:
    from mdi.cluster.launchers.manual import Presence
    from mdi.core.status import NodeStatus

out = Console(markup=False, emoji=False, highlight=False)
err = Console(markup=False, emoji=False, highlight=False, stderr=True)
log = logging.getLogger("mdi")


def say(text: str | Text, console: Console = out) -> None:
    """Prints one text; long lines are left to the terminal."""
    console.print(text, soft_wrap=True)


def bytes_bar() -> Progress:
    return _bar(DownloadColumn())


def steps_bar() -> Progress:
    return _bar(MofNCompleteColumn())


def say_error(text: str) -> None:
    """What ends a command."""
    if logs_json():
        log.error("%s", text)
    else:
        say(Text.assemble(("error:", "bold red"), f" {text}"), err)


def show_nodes(title: str, nodes: Sequence[NodeStatus]) -> None:
    """A table of the nodes of a running engine; a line of the log for each where that is JSON."""
    if not logs_json():
        err.print(nodes_table(title, nodes))
        return
    for node in nodes:
        fields = dict(zip(("node", "layers", "dtype", "device", "memory"), _cells(node), strict=True))
        LINES.info("%(node)s: %(layers)s, %(dtype)s, %(device)s, %(memory)s", fields)


def nodes_table(title: str, nodes: Sequence[NodeStatus]) -> UncutTable:
    """A row for each node of a running engine."""
    table = UncutTable("node", "layers", "dtype", "device", "memory", title=title)
    for node in nodes:
        table.add_row(*_cells(node))
    return table


def _cells(node: NodeStatus) -> tuple[str, ...]:
    layers = f"{node.first_layer}-{node.last_layer - 1}" if node.last_layer else "images" if node.dtype else "spare"
    if node.shards:
        layers = f"{node.shards.share:.0%} of {layers}"
    numbers = described(node.dtype, node.quantization) if node.dtype else ""
    return node.name, layers, numbers, f"{node.device} {node.kernels}", f"{node.resident_bytes / 1e6:,.0f} MB"


class Startup:
    """The display while an engine starts: which nodes are missing, and how far each has loaded.

    Without a terminal, and after the start, it prints a line for each node whose state changed.
    """

    def __init__(self) -> None:
        self._live = False
        self._present: Sequence[Presence] = ()
        self._progress = bytes_bar()
        self._tasks: dict[str, Any] = {}

    @contextmanager
    def shown(self) -> Iterator[None]:
        if not err.is_terminal:
            yield
            return
        self._live = True
        with Live(get_renderable=self._render, console=err, transient=True):
            yield
        self._live = False

    def waiting(self, present: Sequence[Presence]) -> None:
        if not self._live:
            for presence in present:
                if presence.note and presence not in self._present:
                    state = "is there" if presence.there else "is awaited"
                    say(f"node {presence.node.name} {state}: {presence.note}", err)
        self._present = present

    def loading(self, node: str, done: int, total: int) -> None:
        if node not in self._tasks:
            self._tasks[node] = self._progress.add_task(node, total=total)
        self._progress.update(self._tasks[node], completed=done, total=total)

    def _render(self) -> RenderableType:
        if not any(presence.missing for presence in self._present):
            return self._progress
        table = UncutTable("node", "address", "", "", title="waiting for nodes", title_justify="left")
        for presence in self._present:
            state = Text("there", "green") if presence.there else Text("missing", "yellow")
            table.add_row(presence.node.name, presence.node.address, state, presence.note)
        return Group(table, self._progress)


class BytesProgress:
    """The display of work that is counted in bytes: a bar, or two lines without a terminal."""

    def __init__(self) -> None:
        self._doing = ""
        self._bar = bytes_bar()

    def __call__(self, what: str, done: int, total: int) -> None:
        if what != self._doing:
            self._doing = what
            self._bar.start()
            self._task = self._bar.add_task(what, total=total)
            if not err.is_terminal:
                say(f"{what}: {(total - done) / 1e6:,.1f} of {total / 1e6:,.1f} MB to go", err)
        self._bar.update(self._task, completed=done, total=total)
        if done >= total:
            self._bar.stop()
            self._bar.remove_task(self._task)
            self._doing = ""
            say(f"{what}: done", err)


def _bar(amount: ProgressColumn) -> Progress:
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), amount, TimeElapsedColumn())
    return Progress(*columns, console=err, transient=True, disable=not err.is_terminal)
