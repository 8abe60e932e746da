"""Slots of the KV cache, and prefix reuse: a sequence takes over what a slot holds of its prefix. Pure.

A free slot keeps what was computed in it until it is taken. The longest prefix that a sequence shares with a free or
running slot is not computed again: it is used in place, or copied inside every node.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

from mdi.core.batch import Copy

MIN_PREFIX = 16  # tokens: a shorter prefix is computed as fast as it is copied


class Cached(Protocol):
    """A sequence, as slots need it.

    prefix_keys: one for each known token; equal prefixes of keys mean equal cache contents. computed: tokens in the
    slot's cache. cached_tokens: those of them that another sequence had computed.
    """

    slot: int | None
    computed: int
    cached_tokens: int

    @property
    def prefix_keys(self) -> Sequence[int]: ...

    def align_to_media(self, length: int) -> int:
        """The length of the longest prefix of at most `length` tokens that ends inside no image or video."""


C = TypeVar("C", bound=Cached)


class Slots(Generic[C]):
    """`n_slots` slots, each free or taken by one sequence."""

    def __init__(self, n_slots: int) -> None:
        self._kept: dict[int, Sequence[int]] = dict.fromkeys(range(n_slots), ())  # free slots; the first is taken next
        self._taken: dict[int, C] = {}

    @property
    def free(self) -> int:
        return len(self._kept)

    def take(self, sequence: C) -> Copy | None:
        """Gives a sequence a slot and the known part of its prefix; returns the copy that this needs, if any.

        The copy is of what all batches so far have computed: it belongs to the next batch.
        """
        source, length = self._longest_prefix(sequence)
        in_place = source in self._kept and 2 * length >= len(self._kept[source])
        slot = source if in_place and length else next(iter(self._kept))
        del self._kept[slot]
        self._taken[slot] = sequence
        sequence.slot = slot
        sequence.computed = sequence.cached_tokens = length
        return Copy(source, slot, length) if length and source != slot else None

    def give_back(self, sequence: C) -> None:
        """Frees a sequence's slot, which keeps what was computed in it until it is taken again."""
        assert sequence.slot is not None
        del self._taken[sequence.slot]
        kept = list(sequence.prefix_keys[: sequence.computed])
        if len(kept) >= MIN_PREFIX:
            self._kept[sequence.slot] = kept
        else:
            self._kept = {sequence.slot: (), **self._kept}
        sequence.slot = None

    def forget(self) -> None:
        """Marks all caches as empty."""
        self._kept = dict.fromkeys(self._kept, ())
        for sequence in self._taken.values():
            sequence.computed = 0

    def _longest_prefix(self, sequence: C) -> tuple[int, int]:
        """The slot that holds most of a sequence's prefix, and how many tokens of it.

        The last token is never among them: its logits are needed.
        """
        keys = list(sequence.prefix_keys)
        contents = {slot: other.prefix_keys[: other.computed] for slot, other in self._taken.items()} | self._kept
        shared = {slot: common_length(keys, content) for slot, content in contents.items()}
        slot = max(shared, key=lambda slot: (shared[slot], slot in self._kept))
        length = sequence.align_to_media(min(shared[slot], len(keys) - 1))
        return slot, length if length >= MIN_PREFIX else 0


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """The length of the longest common prefix. Compares slices, which is faster than counting in Python."""
    same, length = 0, min(len(first), len(second))
    while length > 0:
        half = -(-length // 2)
        if first[same : same + half] == second[same : same + half]:
            same += half
            length -= half
        else:
            length = half - 1
    return same
