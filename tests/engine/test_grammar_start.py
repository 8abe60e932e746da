"""When a constraint begins to hold: behind its begin, and behind thoughts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Self

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdi.core.constraint import Constraint
from mdi.engine.grammar_start import AfterThoughts, WhenBegun

TEXTS = {1: b"<call", 2: b">", 3: b">1", 4: b">x", 5: b" a", 6: b"{1", 7: b"\xc3", 8: b"1", 9: b";"}
THINK, THOUGHT, MARK = 20, 21, 30
MASK = b"\x02\x00\x00\x00"


class Digits:
    """A grammar of a begin, one digit or more, and a semicolon, which completes it. Digits are tokens 8."""

    def __init__(self) -> None:
        self.text = b""

    @property
    def complete(self) -> bool:
        return self.text.endswith(b";")

    def copy(self) -> Self:
        made = type(self)()
        made.text = self.text
        return made

    def push(self, token_id: int) -> None:
        assert token_id in (8, 9), "not as the mask allows"
        self.text += TEXTS[token_id]

    def mask(self, end_ids: Iterable[int], *, may_end: bool) -> bytes:
        return MASK

    def accepts(self, token_ids: Sequence[int]) -> bool:
        return list(token_ids) == [MARK]

    def accepts_text(self, text: bytes) -> bool:
        self.text = text
        return text.removeprefix(b"<call>").removeprefix(b"{").removesuffix(b";").isdigit() or text == b"<call>"


def rule(*, repeats: bool = False, begins: tuple[str, ...] = ("<call>",), opens: tuple[str, ...] = ()) -> WhenBegun:
    constraint = Constraint("", "tools", begins, opens, repeats)
    return WhenBegun(Digits(), constraint, lambda token_id: TEXTS.get(token_id, b""), {"[MARK]": MARK})


def held(given: WhenBegun | AfterThoughts, ids: Sequence[int]) -> list[bool]:
    """After which tokens the grammar holds."""
    after = []
    for token_id in ids:
        given.push(token_id)
        after.append(given.mask((), may_end=True) is not None)
    return after


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ((5, 1, 2, 8), [False, False, True, True]),
        ((1, 3, 8), [False, True, True]),  # the token that ends the mark has the first digit as well
        ((1, 4, 5), [False, False, False]),  # ... or what is no call: all of it is text
        ((1, 4, 1, 2), [False, False, False, True]),
        ((1, 1, 2), [False, False, True]),
        ((5, 7, 5), [False, False, False]),
        ((MARK,), [False]),  # not one of its begins
    ],
)
def test_a_grammar_holds_from_its_begin_on(ids: tuple[int, ...], expected: list[bool]) -> None:
    assert held(rule(), ids) == expected


def test_a_special_token_is_a_begin() -> None:
    assert held(rule(begins=("[MARK]",)), (5, MARK, 8)) == [False, True, True]


def test_some_begins_count_at_the_start_only() -> None:
    assert held(rule(opens=("{",)), (6, 8)) == [True, True]
    assert held(rule(opens=("{",)), (5, 6, 8)) == [False, False, False]
    assert held(rule(opens=("{",)), (5, 1, 2)) == [False, False, True]


def test_a_complete_grammar_ends_the_answer_or_begins_again() -> None:
    once, again = rule(), rule(repeats=True)
    assert held(once, (1, 2, 8, 9)) == [False, True, True, True]
    assert once.complete
    assert held(again, (1, 2, 8, 9, 5, 1, 2)) == [False, True, True, False, False, False, True]
    assert not again.complete


def test_copies_are_answers_of_their_own() -> None:
    first = rule()
    held(first, (1,))
    second = first.copy()
    assert held(first, (2, 8)) == [True, True]
    assert held(second, (5,)) == [False]


@settings(deadline=None)
@given(ids=st.lists(st.sampled_from(list(TEXTS)[:7]), max_size=12))
def test_a_begin_is_found_in_whatever_tokens_it_comes(ids: list[int]) -> None:
    text, expected = b"", False
    checked = rule(begins=("<call>",))
    for token_id in ids:
        text += TEXTS[token_id]
        expected = text.endswith((b"<call>", b"<call>1"))
        assert (held(checked, [token_id]) == [True]) is expected
        if expected:
            break


def test_a_rule_holds_behind_thoughts() -> None:
    opened = AfterThoughts(Digits(), (THINK, THOUGHT), opened=True)
    ends = (3,)
    assert opened.mask(ends, may_end=True) == b"\xf7\xff\xff\xff"  # anything but the end
    for token_id in (5, 9, 1, THOUGHT):
        assert not opened.complete
        opened.push(token_id)
    assert opened.mask(ends, may_end=True) == MASK
    for token_id in (8, 9):
        opened.push(token_id)
    assert opened.complete


def test_an_answer_may_begin_with_thoughts_or_not() -> None:
    thinking = AfterThoughts(Digits(), (THINK, THOUGHT), opened=False)
    plain = thinking.copy()
    assert thinking.mask((), may_end=True) == b"\x02\x00\x10\x00"  # what the rule allows, or the first mark
    thinking.push(THINK)
    thinking.push(5)
    assert thinking.mask((), may_end=True) == b"\xff\xff\xff\xff"
    plain.push(8)
    assert plain.mask((), may_end=True) == MASK


def test_a_call_in_thoughts_is_none() -> None:
    thinking = AfterThoughts(rule(), (THINK, THOUGHT), opened=False)
    assert held(thinking, (THINK, 1, 2, 8, THOUGHT, 5, 1, 2)) == [False] * 7 + [True]
