"""Slots: the longest shared prefix is found and reused in place or by a copy, and never ends inside an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdi.core.batch import Copy
from mdi.engine.slots import MIN_PREFIX, Slots, common_length

PLAIN = list(range(100, 200))


@dataclass(eq=False)
class FakeSequence:
    """image: where one stands, and where it ends."""

    prefix_keys: Sequence[int]
    image: tuple[int, int] = (0, 0)
    slot: int | None = None
    computed: int = 0
    cached_tokens: int = 0

    def align_to_media(self, length: int) -> int:
        start, end = self.image
        return start if start < length < end else length


@given(st.lists(st.integers(0, 1)), st.lists(st.integers(0, 1)))
def test_common_prefixes_are_found(first: list[int], second: list[int]) -> None:
    counted = 0
    while counted < min(len(first), len(second)) and first[counted] == second[counted]:
        counted += 1
    assert common_length(first, second) == counted


def ran(slots: Slots[FakeSequence], keys: Sequence[int]) -> int:
    """A sequence comes, is computed and leaves; the slot it was in."""
    sequence = FakeSequence(keys)
    slots.take(sequence)
    sequence.computed, slot = len(keys), sequence.slot
    slots.give_back(sequence)
    assert slot is not None
    return slot


@pytest.mark.parametrize(
    ("before", "after", "cached"),
    [
        (PLAIN, [*PLAIN, 1, 2], 100),
        (PLAIN, PLAIN, 99),  # the last token's logits are needed
        (PLAIN, [*PLAIN[:60], 7, 7, 7], 60),
        (PLAIN, [5, *PLAIN], 0),
        (PLAIN[:MIN_PREFIX], [*PLAIN[:MIN_PREFIX], 1], MIN_PREFIX),
        (PLAIN[: MIN_PREFIX - 1], [*PLAIN[: MIN_PREFIX - 1], 1], 0),
    ],
)
def test_a_free_slot_is_taken_with_what_it_holds(before: list[int], after: list[int], cached: int) -> None:
    slots: Slots[FakeSequence] = Slots(3)
    slot = ran(slots, before)
    sequence = FakeSequence(after)
    assert slots.take(sequence) is None
    assert sequence.computed == sequence.cached_tokens == cached
    assert (sequence.slot == slot) or not cached


def test_a_prefix_is_copied_from_a_running_slot() -> None:
    slots: Slots[FakeSequence] = Slots(2)
    first, second = FakeSequence(PLAIN), FakeSequence([*PLAIN, 1])
    slots.take(first)
    first.computed = 40
    assert slots.take(second) == Copy(source=0, target=1, length=40)
    assert second.computed == 40


def test_a_short_prefix_displaces_no_long_conversation() -> None:
    slots: Slots[FakeSequence] = Slots(2)
    slot = ran(slots, PLAIN)
    other = FakeSequence([*PLAIN[:20], *range(50)])
    assert slots.take(other) == Copy(source=slot, target=1 - slot, length=20)


def test_the_slot_that_was_left_longest_ago_is_taken_first() -> None:
    slots: Slots[FakeSequence] = Slots(3)
    used = [ran(slots, [start] * 50) for start in range(3)]
    assert sorted(used) == [0, 1, 2]
    assert [ran(slots, [start] * 50) for start in (7, 8)] == used[:2]


def test_hardly_anything_is_no_reason_to_keep_a_slot() -> None:
    slots: Slots[FakeSequence] = Slots(2)
    ran(slots, PLAIN)
    assert ran(slots, [1]) == ran(slots, [2])


@pytest.mark.parametrize(("shared", "cached"), [(29, 20), (30, 30), (35, 35), (20, 20), (19, 19)])
def test_no_prefix_ends_inside_an_image(shared: int, cached: int) -> None:
    slots: Slots[FakeSequence] = Slots(1)
    ran(slots, PLAIN[:shared])
    sequence = FakeSequence(PLAIN, image=(20, 30))
    slots.take(sequence)
    assert sequence.computed == cached


def test_nothing_is_known_of_empty_caches() -> None:
    slots: Slots[FakeSequence] = Slots(2)
    ran(slots, PLAIN)
    running, late = FakeSequence(range(500, 600)), FakeSequence([*PLAIN, 1])
    slots.take(running)
    running.computed = 50
    slots.forget()
    slots.take(late)
    assert running.computed == late.computed == 0
