"""Thoughts, and the answers behind them."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdi.tools.thoughts import Thought, ThoughtSplitter

MARKS = ("<think>", "</think>")


def split(pieces: list[str], *, opened: bool) -> tuple[str, str]:
    """The thoughts and the answer."""
    splitter = ThoughtSplitter(MARKS, opened=opened)
    parts = [part for piece in pieces for part in splitter.push(piece)] + splitter.push("", final=True)
    thoughts = "".join(part.text for part in parts if isinstance(part, Thought))
    return thoughts, "".join(part for part in parts if isinstance(part, str))


TEXTS = [
    ("<think>\nHe asks.\n\nSo?\n</think>\n\nYes. </think>\n", False, ("He asks.\n\nSo?", "Yes. </think>\n")),
    ("\n<think></think>Yes", False, ("", "Yes")),
    ("He asks.\n</think>\n\nYes", True, ("He asks.", "Yes")),
    ("<think>again</think>Yes", True, ("again", "Yes")),
    ("never ends </thin", True, ("never ends </thin", "")),
    ("<think>cut ", False, ("cut", "")),
    (" <thin", False, ("", " <thin")),
    ("No <think>thoughts</think>", False, ("", "No <think>thoughts</think>")),
    ("\n plain \n", False, ("", "\n plain \n")),
]


@pytest.mark.parametrize(("text", "opened", "expected"), TEXTS)
@settings(deadline=None, max_examples=30)
@given(cuts=st.lists(st.integers(0, 50), max_size=8))
def test_any_split_gives_the_same_thoughts(text: str, opened: bool, expected: tuple[str, str], cuts: list[int]) -> None:
    places = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    pieces = [text[start:end] for start, end in itertools.pairwise(places)]
    assert split(pieces, opened=opened) == expected
