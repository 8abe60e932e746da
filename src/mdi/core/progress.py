"""How far work is: one callback type for everything that takes a while."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with (what is done, done, total); both counts are bytes unless the caller says otherwise."""


def counter(progress: Progress | None, what: str, total: int) -> Callable[[int], None]:
    """A function that adds up the counts it is called with, and reports the sum."""
    done = 0

    def count(more: int) -> None:
        nonlocal done
        done += more
        if progress:
            progress(what, done, total)

    return count
