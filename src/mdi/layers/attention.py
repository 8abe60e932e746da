"""Causal attention of a packed batch over the KV cache, and full attention for vision towers. Knows no weights."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from mdi.core.batch import Slice

SCORES_AT_ONCE = 2**20
"""Attention scores that are computed at once, so that they stay in a CPU's cache."""

BLOCK_ROWS = 128
"""Rows of a prefill chunk that attend together, up to the key of their last: 0.75 of the time of 512 at once."""


@dataclass(frozen=True)
class RowBlock:
    """Some rows of one slice that attend together.

    rows: in the batch. slot: of the KV cache. end: position behind the last row. mask: for several rows that start
    behind position 0; None where no mask or a causal one is enough.
    """

    rows: slice
    slot: int
    end: int
    mask: Tensor | None


class CausalMasks:
    """Masks for blocks that start behind position 0, as views of one table.

    In a block of q rows from position s, row i attends to key j where j <= s + i. In a table with 0 where
    column <= width + i, and -inf elsewhere, that mask is the window of columns [width - s, width + q).
    """

    def __init__(self, sequence_length: int, dtype: torch.dtype, device: torch.device) -> None:
        self.width = sequence_length
        shape = (BLOCK_ROWS, sequence_length + BLOCK_ROWS)
        future = torch.full(shape, float("-inf"), dtype=dtype, device=device)
        self.table = future.triu_(sequence_length + 1)

    def view(self, start: int, length: int) -> Tensor:
        """[length, start + length] of 0 and -inf."""
        return self.table[:length, self.width - start : self.width + length]


@dataclass(frozen=True)
class Layout:
    """Where a batch's rows are in the KV cache, computed once for all layers. slots, cache_rows: int64 [tokens]."""

    blocks: tuple[RowBlock, ...]
    slots: Tensor
    cache_rows: Tensor

    @classmethod
    def of(cls, slices: Sequence[Slice], masks: CausalMasks, device: torch.device) -> Layout:
        blocks, first = list[RowBlock](), 0
        slots, cache_rows = list[int](), list[int]()
        for part in slices:
            for start in range(part.start, part.end, BLOCK_ROWS):
                length = min(BLOCK_ROWS, part.end - start)
                mask = masks.view(start, length) if length > 1 and start > 0 else None
                blocks.append(RowBlock(slice(first, first + length), part.slot, start + length, mask))
                first += length
            slots += [part.slot] * part.length
            cache_rows += range(part.start, part.end)
        return cls(tuple(blocks), torch.tensor(slots, device=device), torch.tensor(cache_rows, device=device))


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
    keys, values = cache[block.slot, : block.end].permute(1, 2, 0, 3)  # each [kv_heads, end, head_dim]
    kv_heads = keys.shape[0]
    group = n_heads // kv_heads
    if length == 1:  # a decode step: the group's heads are the rows of one small product
        grouped = queries.view(1, kv_heads, group, head_dim)
        out = functional.scaled_dot_product_attention(grouped, keys[None], values[None])
        return out.view(1, n_heads * head_dim)
    grouped = queries.view(length, kv_heads, group, head_dim).permute(1, 2, 0, 3)
    shared = (kv_heads, group, block.end, head_dim)
    out = functional.scaled_dot_product_attention(
        grouped,
        keys[:, None].expand(shared),
        values[:, None].expand(shared),
        attn_mask=block.mask,
        is_causal=block.mask is None,
    )
    return out.permute(2, 0, 1, 3).reshape(length, n_heads * head_dim)


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
