"""Slots of the KV cache, their memory, and prefix reuse: a sequence takes over what a slot holds of its prefix. Pure.

A free slot keeps what was computed in it until it is taken, or its memory is needed. The longest prefix that a sequence
shares with a free or running slot is not computed again: it is used in place, or copied inside every node.

Memory is counted in blocks of tokens. A running sequence has blocks for the tokens that it knows, a free slot for those
it keeps. When a sequence needs more than is left, free slots give theirs up: the least recently used first, from its
end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

from mdi.core.batch import CACHE_BLOCK, CacheEdit, Copy, Release

MIN_PREFIX = 16  # tokens: a shorter prefix is computed as fast as it is copied


class Cached(Protocol):
    """A sequence, as slots need it.

    prefix_keys: one for each known token; equal prefixes of keys mean equal cache contents. computed: tokens in the
    slot's cache. cached_tokens: those of them that another sequence had computed; None before it first had a slot.
    """

    slot: int | None
    computed: int
    cached_tokens: int | None

    @property
    def prefix_keys(self) -> Sequence[int]: ...

    def align_to_media(self, length: int) -> int:
        """The length of the longest prefix of at most `length` tokens that ends inside no image or video."""


C = TypeVar("C", bound=Cached)


class Slots(Generic[C]):
    """`n_slots` slots, each free or taken by one sequence, with memory for `n_tokens` together."""

    def __init__(self, n_slots: int, n_tokens: int) -> None:
        self._n_blocks = n_tokens // CACHE_BLOCK
        self._kept: dict[int, Sequence[int]] = dict.fromkeys(range(n_slots), ())  # free slots; the first is taken next
        self._taken: dict[int, C] = {}
        self._blocks = [0] * n_slots  # of each slot
        self._edits: list[CacheEdit] = []

    @property
    def free(self) -> int:
        """Free slots."""
        return len(self._kept)

    @property
    def used_tokens(self) -> int:
        """Tokens that memory is given for."""
        return sum(self._blocks) * CACHE_BLOCK

    @property
    def used_share(self) -> float:
        """Part of the memory that running sequences have. From any thread."""
        return (self._n_blocks - self._left()) / self._n_blocks

    def fits(self, n_tokens: int, spare_blocks: int = 0) -> bool:
        """Whether there is memory for so many more tokens, and some to spare, if all free slots give theirs up."""
        return self._left() >= _blocks(n_tokens) + spare_blocks

    def take(self, sequence: C) -> None:
        """Gives a sequence that fits a slot, memory for what is known of it, and the known part of its prefix.

        A copy that this needs is of what all batches so far have computed: it belongs to the next batch.
        """
        source, length = self._longest_prefix(sequence)
        needed = _blocks(len(sequence.prefix_keys))
        slot = source if self._in_place(source, length, needed) else next(iter(self._kept))
        self._shorten(slot, length if slot == source else 0)
        del self._kept[slot]
        self._taken[slot] = sequence
        self._give_memory(slot, needed, besides=source if length else slot)
        if length and source != slot:
            self._edits.append(Copy(source, slot, length))
        sequence.slot = slot
        sequence.computed = length
        if sequence.cached_tokens is None:
            sequence.cached_tokens = length

    def grow(self, sequence: C, n_tokens: int) -> bool:
        """Gives a running sequence memory for its first `n_tokens`; False when running sequences hold too much."""
        assert sequence.slot is not None
        blocks = _blocks(n_tokens)
        if self._left() < blocks - self._blocks[sequence.slot]:
            return False
        self._give_memory(sequence.slot, blocks)
        return True

    def give_back(self, sequence: C) -> None:
        """Frees a sequence's slot, which keeps what was computed in it."""
        slot = sequence.slot
        assert slot is not None
        del self._taken[slot]
        self._kept[slot] = list(sequence.prefix_keys[: sequence.computed])
        self._shorten(slot, sequence.computed if sequence.computed >= MIN_PREFIX else 0)
        sequence.slot = None

    def forget(self) -> None:
        """Marks all caches as empty."""
        self._edits.clear()
        for slot in list(self._kept):
            self._shorten(slot, 0)
        for sequence in self._taken.values():
            sequence.computed = 0

    def take_edits(self) -> tuple[CacheEdit, ...]:
        """What is to be done to the cache before the next batch, in order."""
        edits = tuple(self._edits)
        self._edits.clear()
        return edits

    def _left(self) -> int:
        """Blocks that no running sequence has."""
        return self._n_blocks - sum(self._blocks[slot] for slot in tuple(self._taken))

    def _in_place(self, source: int, length: int, needed: int) -> bool:
        """Whether a sequence goes on in the free slot with its prefix: not where that slot would lose much more.

        Unless there is no memory for both.
        """
        if not length or source not in self._kept:
            return False
        return 2 * length >= len(self._kept[source]) or self._left() < needed + self._blocks[source]

    def _give_memory(self, slot: int, blocks: int, besides: int | None = None) -> None:
        """Raises a slot's blocks to so many, at the cost of free slots besides this one. There is enough."""
        for kept in list(self._kept):
            missing = sum(self._blocks) - self._blocks[slot] + blocks - self._n_blocks
            if missing > 0 and kept != besides:
                self._shorten(kept, max(0, self._blocks[kept] - missing) * CACHE_BLOCK)
        self._blocks[slot] = max(blocks, self._blocks[slot])

    def _shorten(self, slot: int, length: int) -> None:
        """Lets a free slot keep so many tokens at most, and gives back the memory of the others."""
        self._kept[slot] = self._kept[slot][:length]
        if not self._kept[slot]:
            self._kept = {slot: (), **self._kept}
        blocks = _blocks(len(self._kept[slot]))
        if blocks < self._blocks[slot]:
            self._blocks[slot] = blocks
            self._edits.append(Release(slot, len(self._kept[slot])))

    def _longest_prefix(self, sequence: C) -> tuple[int, int]:
        """The slot that holds most of a sequence's prefix, and how many tokens of it.

        The last token is never among them: its logits are needed.
        """
        keys = sequence.prefix_keys
        limit = len(keys) - 1
        shared = {slot: common_length(keys, kept, limit) for slot, kept in self._kept.items()}
        for slot, other in self._taken.items():
            shared[slot] = common_length(keys, other.prefix_keys, min(limit, other.computed))
        slot = max(shared, key=lambda slot: (shared[slot], slot in self._kept))
        length = sequence.align_to_media(shared[slot])
        return slot, length if length >= MIN_PREFIX else 0


def common_length(first: Sequence[int], second: Sequence[int], limit: int) -> int:
    """The length of the longest common prefix, of `limit` tokens at most.

    Compares slices, which is faster than counting in Python: short ones first, so that a difference is found early.
    """
    same, differs = 0, min(len(first), len(second), limit) + 1  # `same` tokens are equal, `differs` are not
    step = 1
    while differs - same > 1:
        middle = min(same + step, (same + differs) // 2)
        if first[same:middle] == second[same:middle]:
            same, step = middle, 2 * step
        else:
            differs = middle
    return same


def _blocks(n_tokens: int) -> int:
    return -(-n_tokens // CACHE_BLOCK)
