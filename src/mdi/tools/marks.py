"""Marks in a text that grows by pieces."""

from __future__ import annotations

from collections.abc import Sequence


def find_mark(text: str, marks: Sequence[str]) -> tuple[int, bool]:
    """Where the first mark stands; without one, False, and where the text's end begins that may become a mark."""
    found = [place for mark in marks if (place := text.find(mark)) >= 0]
    if found:
        return min(found), True
    start = max(0, len(text) - max(map(len, marks)) + 1)
    ends = (place for place in range(start, len(text)) if any(mark.startswith(text[place:]) for mark in marks))
    return next(ends, len(text)), False
