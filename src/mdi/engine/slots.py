"""Slots, and what their caches still hold: a sequence that begins like another takes that part over. Pure.

A free slot keeps what was computed in it until it is taken. What a sequence shares with it, or with one that runs, is
not computed again: the longest such beginning is used in place, or copied inside every node.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

from mdi.core.batch import Copy

LEAST_KEPT = 16  # shorter beginnings are computed as fast as they are copied, and take no other's place


class Cached(Protocol):
    """What slots see of a sequence. keys: one for each known token; equal beginnings mean equal cache contents."""

    slot: int | None
    computed: int
    reused: int

    @property
    def keys(self) -> Sequence[int]: ...

    def whole(self, length: int) -> int:
        """The longest beginning of at most `length` tokens that ends inside no image or video."""


C = TypeVar("C", bound=Cached)


class Slots(Generic[C]):
    """`n_slots` of them, each free or of one sequence."""

    def __init__(self, n_slots: int) -> None:
        self._kept: dict[int, Sequence[int]] = dict.fromkeys(range(n_slots), ())  # free slots; the first is taken next
        self._taken: dict[int, C] = {}

    @property
    def free(self) -> int:
        return len(self._kept)

    def take(self, sequence: C) -> Copy | None:
        """Gives a sequence a slot, and what is known of its beginning; the copy that this needs, if any.

        The copy is of what has been computed by all batches so far: it belongs to the next one.
        """
        source, length = self._longest_beginning(sequence)
        in_place = source in self._kept and 2 * length >= len(self._kept[source])
        slot = source if in_place and length else next(iter(self._kept))
        del self._kept[slot]
        self._taken[slot] = sequence
        sequence.slot = slot
        sequence.computed = sequence.reused = length
        return Copy(source, slot, length) if length and source != slot else None

    def give_back(self, sequence: C) -> None:
        """Frees a sequence's slot; what it has computed is kept until somebody takes the slot."""
        assert sequence.slot is not None
        del self._taken[sequence.slot]
        kept = list(sequence.keys[: sequence.computed])
        if len(kept) >= LEAST_KEPT:
            self._kept[sequence.slot] = kept
        else:
            self._kept = {sequence.slot: (), **self._kept}
        sequence.slot = None

    def forget(self) -> None:
        """All caches are empty."""
        self._kept = dict.fromkeys(self._kept, ())
        for sequence in self._taken.values():
            sequence.computed = 0

    def _longest_beginning(self, sequence: C) -> tuple[int, int]:
        """A slot that holds most of it, and how many tokens of it; the last one has to be computed in any case."""
        known = list(sequence.keys)
        held = {slot: other.keys[: other.computed] for slot, other in self._taken.items()} | self._kept
        shared = {slot: common_length(known, keys) for slot, keys in held.items()}
        slot = max(shared, key=lambda slot: (shared[slot], slot in self._kept))
        length = sequence.whole(min(shared[slot], len(known) - 1))
        return slot, length if length >= LEAST_KEPT else 0


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two lists have in common at their beginning. Slices compare faster than Python counts."""
    same, length = 0, min(len(first), len(second))
    while length > 0:
        half = -(-length // 2)
        if first[same : same + half] == second[same : same + half]:
            same += half
            length -= half
        else:
            length = half - 1
    return same
