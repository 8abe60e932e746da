"""Slots: the longest shared prefix is found and reused, never ends inside an image, and gives up its memory in time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdi.core.batch import CACHE_BLOCK as BLOCK
from mdi.core.batch import Copy, Release
from mdi.engine.slots import MIN_PREFIX, Slots, common_length

MUCH = 10**6  # tokens: as if memory were endless
PLAIN = list(range(100, 200))


@dataclass(eq=False)
class FakeSequence:
    """image: where one stands, and where it ends."""

    prefix_keys: Sequence[int]
    image: tuple[int, int] = (0, 0)
    slot: int | None = None
    computed: int = 0
    cached_tokens: int | None = None

    def align_to_media(self, length: int) -> int:
        start, end = self.image
        return start if start < length < end else length


@given(st.lists(st.integers(0, 1)), st.lists(st.integers(0, 1)), st.integers(0, 60), st.integers(0, 60))
def test_common_prefixes_are_found(first: list[int], second: list[int], limit: int, same: int) -> None:
    first, second = [2] * same + first, [2] * same + second
    counted = 0
    while counted < min(len(first), len(second), limit) and first[counted] == second[counted]:
        counted += 1
    assert common_length(first, second, limit) == counted


def ran(slots: Slots[FakeSequence], keys: Sequence[int]) -> int:
    """A sequence comes, is computed and leaves; the slot it was in."""
    sequence = FakeSequence(keys)
    slots.take(sequence)
    sequence.computed, slot = len(keys), sequence.slot
    slots.give_back(sequence)
    slots.take_edits()
    assert slot is not None
    return slot


@pytest.mark.parametrize(
    ("before", "after", "cached"),
    [
        (PLAIN, [*PLAIN, 1, 2], 100),
        (PLAIN, PLAIN, 99),  # the last token's logits are needed
        (PLAIN, [*PLAIN[:66], 7, 7, 7], 66),
        (PLAIN, [5, *PLAIN], 0),
        (PLAIN[:MIN_PREFIX], [*PLAIN[:MIN_PREFIX], 1], MIN_PREFIX),
        (PLAIN[: MIN_PREFIX - 1], [*PLAIN[: MIN_PREFIX - 1], 1], 0),
    ],
)
def test_a_free_slot_is_taken_with_what_it_holds(before: list[int], after: list[int], cached: int) -> None:
    slots: Slots[FakeSequence] = Slots(3, MUCH)
    slot = ran(slots, before)
    sequence = FakeSequence(after)
    slots.take(sequence)
    assert slots.take_edits() == ()
    assert sequence.computed == sequence.cached_tokens == cached
    assert (sequence.slot == slot) or not cached


def test_a_prefix_is_copied_from_a_running_slot() -> None:
    slots: Slots[FakeSequence] = Slots(2, MUCH)
    first, second = FakeSequence(PLAIN), FakeSequence([*PLAIN, 1])
    slots.take(first)
    first.computed = 40
    slots.take(second)
    assert slots.take_edits() == (Copy(source=0, target=1, length=40),)
    assert second.computed == 40


def test_a_short_prefix_displaces_no_long_conversation() -> None:
    slots: Slots[FakeSequence] = Slots(2, MUCH)
    slot = ran(slots, PLAIN)
    other = FakeSequence([*PLAIN[:20], *range(50)])
    slots.take(other)
    assert slots.take_edits() == (Copy(source=slot, target=1 - slot, length=20),)


def test_the_slot_that_was_left_longest_ago_is_taken_first() -> None:
    slots: Slots[FakeSequence] = Slots(3, MUCH)
    used = [ran(slots, [start] * 50) for start in range(3)]
    assert sorted(used) == [0, 1, 2]
    assert [ran(slots, [start] * 50) for start in (7, 8)] == used[:2]


def test_hardly_anything_is_no_reason_to_keep_a_slot() -> None:
    slots: Slots[FakeSequence] = Slots(2, MUCH)
    ran(slots, PLAIN)
    assert ran(slots, [1]) == ran(slots, [2])


@pytest.mark.parametrize(("shared", "cached"), [(29, 20), (30, 30), (35, 35), (20, 20), (19, 19)])
def test_no_prefix_ends_inside_an_image(shared: int, cached: int) -> None:
    slots: Slots[FakeSequence] = Slots(1, MUCH)
    ran(slots, PLAIN[:shared])
    sequence = FakeSequence(PLAIN, image=(20, 30))
    slots.take(sequence)
    assert sequence.computed == cached


def test_nothing_is_known_of_empty_caches() -> None:
    slots: Slots[FakeSequence] = Slots(2, MUCH)
    ran(slots, PLAIN)
    running, late = FakeSequence(range(500, 600)), FakeSequence([*PLAIN, 1])
    slots.take(running)
    running.computed = 50
    slots.forget()
    slots.take(late)
    assert running.computed == late.computed == 0


def test_what_a_slot_held_before_takes_no_memory_from_the_next_sequence() -> None:
    slots: Slots[FakeSequence] = Slots(1, MUCH)
    ran(slots, range(10 * BLOCK))
    shorter, other = FakeSequence([*range(3 * BLOCK), 0, 0]), FakeSequence([1] * BLOCK)
    slots.take(shorter)
    assert slots.take_edits() == (Release(0, 3 * BLOCK),)
    assert slots.used_tokens == 4 * BLOCK
    shorter.computed = 3 * BLOCK + 2
    slots.give_back(shorter)
    slots.take(other)
    assert slots.take_edits() == (Release(0, 0),)
    assert slots.used_tokens == BLOCK


def test_memory_that_was_given_and_never_used_is_free_again() -> None:
    slots: Slots[FakeSequence] = Slots(2, MUCH)
    sequence = FakeSequence(range(8 * BLOCK))
    slots.take(sequence)
    sequence.computed = 2 * BLOCK - 1
    slots.give_back(sequence)
    assert slots.take_edits() == (Release(0, 2 * BLOCK - 1),)
    assert slots.used_tokens == 2 * BLOCK


def test_the_least_recently_used_prefix_gives_up_its_memory_first_from_its_end() -> None:
    slots: Slots[FakeSequence] = Slots(4, 10 * BLOCK)
    oldest, older, newest = (ran(slots, [start] * 3 * BLOCK) for start in range(3))
    running = FakeSequence([7] * 2 * BLOCK)
    slots.take(running)
    assert slots.take_edits() == (Release(oldest, 2 * BLOCK),)
    assert slots.grow(running, 5 * BLOCK)
    assert slots.take_edits() == (Release(oldest, 0), Release(older, 2 * BLOCK))
    assert slots.used_tokens == 10 * BLOCK
    assert not slots.grow(running, 10 * BLOCK + 1)
    assert slots.grow(running, 10 * BLOCK)
    assert slots.take_edits() == (Release(older, 0), Release(newest, 0))


def test_a_prefix_without_memory_for_a_copy_is_used_in_place() -> None:
    keys = list(range(4 * BLOCK))
    for n_blocks, copied in ((6, True), (5, False)):
        slots: Slots[FakeSequence] = Slots(2, n_blocks * BLOCK)
        slot = ran(slots, keys)
        sequence = FakeSequence([*keys[:BLOCK], 9])
        slots.take(sequence)
        assert sequence.computed == BLOCK
        assert sequence.slot == (1 - slot if copied else slot)
        assert slots.take_edits() == ((Copy(slot, 1 - slot, BLOCK),) if copied else (Release(slot, BLOCK),))


def test_a_copy_is_made_before_its_source_gives_up_memory() -> None:
    slots: Slots[FakeSequence] = Slots(3, 7 * BLOCK)
    keys = list(range(4 * BLOCK))
    slot = ran(slots, keys)
    first, second = FakeSequence([*keys[:BLOCK], 9]), FakeSequence([9] * 3 * BLOCK)
    slots.take(first)
    slots.take(second)
    assert slots.take_edits() == (Copy(slot, 1, BLOCK), Release(slot, 2 * BLOCK))


def test_after_a_loss_free_slots_hold_no_memory() -> None:
    slots: Slots[FakeSequence] = Slots(2, MUCH)
    slot = ran(slots, range(3 * BLOCK))
    running = FakeSequence([1] * BLOCK)
    slots.take(running)
    slots.forget()
    assert slots.take_edits() == (Release(slot, 0),)
    assert slots.used_tokens == BLOCK


@dataclass
class Shadow:
    """What nodes hold: tokens of each slot, and where memory was touched. Applies edits as nodes do."""

    contents: dict[int, list[int]]

    def apply(self, edits: Sequence[Copy | Release]) -> None:
        for edit in edits:
            if isinstance(edit, Copy):
                self.contents[edit.target] = self.contents[edit.source][: edit.length]
            else:
                del self.contents[edit.slot][edit.kept :]

    def blocks(self) -> int:
        return sum(-(-len(content) // BLOCK) for content in self.contents.values())


@given(st.data())
def test_whatever_happens_memory_stays_in_its_bounds_and_prefixes_are_what_they_seem(data: st.DataObject) -> None:
    n_slots, n_blocks = data.draw(st.integers(1, 4)), data.draw(st.integers(3, 12))
    slots: Slots[FakeSequence] = Slots(n_slots, n_blocks * BLOCK)
    shadow, running = Shadow({slot: [] for slot in range(n_slots)}), list[FakeSequence]()
    for _ in range(data.draw(st.integers(1, 25))):
        keys = [data.draw(st.integers(0, 1))] * data.draw(st.integers(1, 2 * BLOCK))
        keys += [data.draw(st.integers(0, 2))] * data.draw(st.integers(0, 2 * BLOCK))
        if slots.free and slots.fits(len(keys)) and data.draw(st.booleans()):
            sequence = FakeSequence(keys)
            slots.take(sequence)
            running.append(sequence)
        elif running:
            sequence = data.draw(st.sampled_from(running))
            if data.draw(st.booleans()):
                running.remove(sequence)
                slots.give_back(sequence)
            else:
                keys = [*sequence.prefix_keys, *range(data.draw(st.integers(1, BLOCK)))]
                if slots.grow(sequence, len(keys)):
                    sequence.prefix_keys = keys
        shadow.apply(slots.take_edits())
        for sequence in running:
            assert sequence.slot is not None
            content = shadow.contents[sequence.slot]
            assert content[: sequence.computed] == sequence.prefix_keys[: sequence.computed]
            sequence.computed = data.draw(st.integers(sequence.computed, len(sequence.prefix_keys)))
            content[:] = sequence.prefix_keys[: sequence.computed]
        assert shadow.blocks() * BLOCK <= slots.used_tokens <= n_blocks * BLOCK
