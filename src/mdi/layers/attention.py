"""Causal attention of a packed batch over the KV cache, and full attention for vision towers. Knows no weights.

On CPUs the bits of a row depend on its slot's contents alone, not on the rows that are computed beside it: a row reads
whole windows of keys, by its position, with a mask; and the rows of a call are filled up to a multiple of ROW_STEP.
Whatever the length of a product, the kernels then take the same path for each row. `rows_agree` tries it.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import cache as cached

import torch
from torch import Tensor
from torch.nn import functional

from mdi.core.batch import Slice
from mdi.layers.kv_cache import WINDOW, window_end

log = logging.getLogger(__name__)

SCORES_AT_ONCE = 2**20
"""Attention scores that are computed at once, so that they stay in a CPU's cache."""

ROW_STEP = 8
"""Rows of queries that the kernels compute alike. With fewer, or an odd rest, products round otherwise."""


@dataclass(frozen=True)
class RowBlock:
    """Some rows of one slice that attend together: those of one window at most.

    rows: in the batch. slot: of the KV cache. keys: how many of the slot are read. mask: [rows, keys], its rows filled
    up to ROW_STEP; None where none or a causal one is enough.
    """

    rows: slice
    slot: int
    keys: int
    mask: Tensor | None


class CausalMasks:
    """Masks for blocks, as views of one table.

    In a block of rows from position s, row i attends to key j where j <= s + i. In a table with 0 where
    column <= width + i, and -inf elsewhere, that mask is the window of columns from width - s on.

    singly: each row attends by itself, because `rows_agree` is false.
    """

    def __init__(self, sequence_length: int, dtype: torch.dtype, device: torch.device, *, singly: bool = False) -> None:
        self.width = window_end(sequence_length)
        self.singly = singly
        self.windowed = device.type == "cpu"
        future = torch.full((WINDOW, self.width + WINDOW), float("-inf"), dtype=dtype, device=device)
        self.table = future.triu_(self.width + 1)

    def view(self, start: int, length: int, keys: int) -> Tensor:
        """[length, keys] of 0 and -inf, for rows from position `start` on."""
        return self.table[:length, self.width - start : self.width - start + keys]

    def block(self, rows: slice, slot: int, start: int) -> RowBlock:
        """The block of these rows, whose first one has position `start`."""
        length = rows.stop - rows.start
        if self.windowed:
            keys = window_end(start + length)
            return RowBlock(rows, slot, keys, self.view(start, _filled(length) if length > 1 else 1, keys))
        keys = start + length
        return RowBlock(rows, slot, keys, self.view(start, length, keys) if length > 1 and start > 0 else None)


@dataclass(frozen=True)
class Layout:
    """Where a batch's rows are in the KV cache, computed once for all layers.

    slots, cache_rows: int64 [tokens]. unwritten: slots and rows behind their newest token, in a window that the batch
    begins.
    """

    blocks: tuple[RowBlock, ...]
    slots: Tensor
    cache_rows: Tensor
    unwritten: tuple[tuple[int, slice], ...]

    @classmethod
    def of(cls, slices: Sequence[Slice], masks: CausalMasks, device: torch.device) -> Layout:
        blocks, first = list[RowBlock](), 0
        slots, cache_rows, unwritten = list[int](), list[int](), list[tuple[int, slice]]()
        for part in slices:
            for start, end in _cut(part.start, part.end, 1 if masks.singly else WINDOW):
                blocks.append(masks.block(slice(first, first + end - start), part.slot, start))
                first += end - start
            slots += [part.slot] * part.length
            cache_rows += range(part.start, part.end)
            rest = window_end(part.end) - part.end
            if rest and part.length >= WINDOW - rest:
                unwritten.append((part.slot, slice(part.end, part.end + rest)))
        return cls(
            tuple(blocks),
            torch.tensor(slots, device=device),
            torch.tensor(cache_rows, device=device),
            tuple(unwritten),
        )

    def write(self, cache: Tensor, keys_values: Tensor) -> None:
        """Writes a batch's keys and values, and zeros behind them: masked keys are read, and may not be infinite.

        cache: one layer's; keys_values: [tokens, 2, n_kv_heads, head_dim].
        """
        cache[self.slots, self.cache_rows] = keys_values
        for slot, rows in self.unwritten:
            cache[slot, rows] = 0


def _cut(start: int, end: int, size: int) -> Iterator[tuple[int, int]]:
    """[start, end) cut at the multiples of `size`."""
    while start < end:
        stop = min(end, start - start % size + size)
        yield start, stop
        start = stop


def _filled(rows: int) -> int:
    return -(-rows // ROW_STEP) * ROW_STEP


def attend(queries: Tensor, cache: Tensor, layout: Layout) -> Tensor:
    """Attention of every slice over its own slot.

    queries: [tokens, n_heads, head_dim]; cache: one layer's [slots, length, 2, n_kv_heads, head_dim], with the keys
    and values of the batch in it. Returns [tokens, n_heads * head_dim]. Query heads share key heads in groups (GQA,
    arXiv:2305.13245) through views; nothing is copied out of the cache.
    """
    if len(layout.blocks) == 1:
        return _attend_block(queries, cache, layout.blocks[0])
    return torch.cat([_attend_block(queries[block.rows], cache, block) for block in layout.blocks])


def _attend_block(queries: Tensor, cache: Tensor, block: RowBlock) -> Tensor:
    length, n_heads, head_dim = queries.shape
    keys, values = cache[block.slot, : block.keys].permute(1, 2, 0, 3)  # each [kv_heads, keys, head_dim]
    kv_heads = keys.shape[0]
    group = n_heads // kv_heads
    if length == 1:  # a decode step: the group's heads are the rows of one small product
        grouped = _fill_up(queries.view(1, kv_heads, group, head_dim))
        out = functional.scaled_dot_product_attention(grouped, keys[None], values[None], attn_mask=block.mask)
        return out[:, :, :group].reshape(1, n_heads * head_dim)
    grouped = _fill_up(queries.view(length, kv_heads, group, head_dim).permute(1, 2, 0, 3))
    shared = (kv_heads, group, block.keys, head_dim)
    out = functional.scaled_dot_product_attention(
        grouped,
        keys[:, None].expand(shared),
        values[:, None].expand(shared),
        attn_mask=block.mask,
        is_causal=block.mask is None,
    )
    return out[:, :, :length].permute(2, 0, 1, 3).reshape(length, n_heads * head_dim)


def _fill_up(queries: Tensor) -> Tensor:
    """[.., rows, head_dim] with zeros behind, on CPUs: see ROW_STEP."""
    rows = queries.shape[-2]
    missing = _filled(rows) - rows
    return functional.pad(queries, (0, 0, 0, missing)) if missing and queries.device.type == "cpu" else queries


@cached
def rows_agree(n_heads: int, n_kv_heads: int, head_dim: int, dtype: torch.dtype) -> bool:
    """Whether a row has the same bits alone, in a small block and in a whole one, on this machine's CPU.

    Tried in the first window of a slot and in the fifth.
    """
    generator, device = torch.Generator().manual_seed(0), torch.device("cpu")
    cache = torch.randn(1, 5 * WINDOW, 2, n_kv_heads, head_dim, generator=generator).to(dtype)
    queries = torch.randn(WINDOW, n_heads, head_dim, generator=generator).to(dtype)
    masks = CausalMasks(5 * WINDOW, dtype, device)
    tried = [(0, 1), (2, 5), (40, 41), (60, 101), (127, 128)]
    for start in (0, 4 * WINDOW):
        together = _attend_block(queries, cache, masks.block(slice(0, WINDOW), 0, start))
        for first, end in tried:
            part = _attend_block(queries[first:end], cache, masks.block(slice(first, end), 0, start + first))
            if not torch.equal(part, together[first:end]):
                log.warning("attention in %s rounds by the number of rows here: prompts are computed row by row", dtype)
                return False
    return True


def attend_fully(queries: Tensor, keys: Tensor, values: Tensor, out: Tensor) -> Generator[None, None, None]:
    """Attention of every token to every token. Yields between small parts of the work.

    queries, keys, values: [heads, tokens, head_dim]; out: [tokens, heads, head_dim]. May overwrite `keys`.

    In bfloat16 on CPUs as blocks of two products and a softmax: 1.3 to 1.6 times as fast there as torch's fused kernel
    (benchmarks/attention.py). There scores are rounded to bfloat16, as in transformers' eager attention. Subtracting
    the mean key first does not change the softmax, and keeps scores and rounding small (arXiv:2410.02367, 3.2).
    """
    heads, tokens, head_dim = queries.shape
    blocked = queries.dtype == torch.bfloat16 and queries.device.type == "cpu"
    n_heads, n_rows = heads, max(64, 2 * SCORES_AT_ONCE // tokens)
    if blocked:
        keys = keys.sub_(keys.mean(1, keepdim=True)).mul_(head_dim**-0.5).transpose(1, 2)
        n_heads, n_rows = max(1, SCORES_AT_ONCE // tokens**2), max(64, SCORES_AT_ONCE // tokens)
    for head in range(0, heads, n_heads):
        group = slice(head, head + n_heads)
        for row in range(0, tokens, n_rows):
            rows = slice(row, row + n_rows)
            if blocked:
                scores = torch.bmm(queries[group, rows], keys[group])
                attended = torch.bmm(scores.softmax(-1), values[group])
            else:
                attended = functional.scaled_dot_product_attention(queries[group, rows], keys[group], values[group])
            out[rows, group] = attended.transpose(0, 1)
            yield
