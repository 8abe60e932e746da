"""Tables that fit into 80 columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Column, Table


class UncutTable(Table):
    """A table that cuts nothing off: where a terminal is too narrow, words go to the next line.

    Letters do where not even the longest words fit beside each other.
    """

    def __init__(self, *headers: Column | str, narrow: bool = False, **settings: Any) -> None:
        """narrow: for many columns, with blanks alone between them."""
        if narrow:
            settings |= {"box": SIMPLE_HEAD, "show_edge": False, "pad_edge": False, "collapse_padding": True}
        super().__init__(*headers, **settings)
        for column in self.columns:
            column.overflow = "fold"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        needs = [_needs(column, console, options) for column in self.columns]
        room = options.max_width - self._frame(console, options) - sum(need.minimum for need in needs)
        for column, width in zip(self.columns, _widths(needs, room), strict=True):
            column.width = width
        yield from super().__rich_console__(console, options)

    def _frame(self, console: Console, options: ConsoleOptions) -> int:
        """The width of all that is not in a cell."""
        for column in self.columns:
            column.width = 1
        return Measurement.get(console, options, self).maximum - len(self.columns)


def _needs(column: Column, console: Console, options: ConsoleOptions) -> Measurement:
    """The width of a column's longest word, and of its longest line."""
    cells = [Measurement.get(console, options, cell) for cell in (column.header, *column.cells)]
    return Measurement(max(cell.minimum for cell in cells), max(cell.maximum for cell in cells))


def _widths(needs: Sequence[Measurement], room: int) -> list[int | None]:
    """The width of each column. room: what longest words leave; those that need the least more are given it first.

    None, for rich to choose, where they do not even leave that.
    """
    if room < 0:
        return [None] * len(needs)
    widths: list[int | None] = [need.minimum for need in needs]
    order = sorted(range(len(needs)), key=lambda index: needs[index].span)
    for position, index in enumerate(order):
        more = min(needs[index].span, room // (len(order) - position))
        widths[index] = needs[index].minimum + more
        room -= more
    return widths
