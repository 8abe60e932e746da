"""Causal attention of a packed batch over the slots' caches; full attention for the vision tower. Knows no weights."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from mdi.core.batch import Slice

SCORES = 2**20
"""Attention scores worked on at once: what stays in a CPU's cache."""


PART_ROWS = 128
"""Rows of a prefill chunk that attend together, to no key behind their last: 0.75 of the time of 512 at once."""


@dataclass(frozen=True)
class Part:
    """Some rows of one slice, in the batch and in their slot; `mask` where they attend to what came before them."""

    rows: slice
    slot: int
    end: int
    mask: Tensor | None


class CausalMasks:
    """Masks for parts that start behind position 0, as views of one table made once.

    A part of q rows from position s sees key j in row i where j <= s + i. In a table with 0 where
    column <= width + i, and -inf elsewhere, that mask is the window of columns [width - s, width + q).
    """

    def __init__(self, sequence_length: int, dtype: torch.dtype, device: torch.device) -> None:
        self.width = sequence_length
        shape = (PART_ROWS, sequence_length + PART_ROWS)
        future = torch.full(shape, float("-inf"), dtype=dtype, device=device)
        self.table = future.triu_(sequence_length + 1)

    def view(self, start: int, length: int) -> Tensor:
        """[length, start + length] of 0 and -inf."""
        return self.table[:length, self.width - start : self.width + length]


@dataclass(frozen=True)
class Layout:
    """Where a batch's rows go, worked out once and used by every layer. slots, cache_rows: int64 [tokens]."""

    parts: tuple[Part, ...]
    slots: Tensor
    cache_rows: Tensor

    @classmethod
    def of(cls, slices: Sequence[Slice], masks: CausalMasks, device: torch.device) -> Layout:
        parts, first = list[Part](), 0
        slots, cache_rows = list[int](), list[int]()
        for part in slices:
            for start in range(part.start, part.end, PART_ROWS):
                length = min(PART_ROWS, part.end - start)
                mask = masks.view(start, length) if length > 1 and start > 0 else None
                parts.append(Part(slice(first, first + length), part.slot, start + length, mask))
                first += length
            slots += [part.slot] * part.length
            cache_rows += range(part.start, part.end)
        return cls(tuple(parts), torch.tensor(slots, device=device), torch.tensor(cache_rows, device=device))


def attend(queries: Tensor, cache: Tensor, layout: Layout) -> Tensor:
    """Attention of every slice over its own slot.

    queries: [tokens, n_heads, head_dim]; cache: one layer's [slots, length, 2, n_kv_heads, head_dim], the batch's keys
    and values already in it. Returns [tokens, n_heads * head_dim]. Query heads share key heads in groups (GQA,
    arXiv:2305.13245) through views; nothing is copied out of the cache.
    """
    if len(layout.parts) == 1:
        return _attend_part(queries, cache, layout.parts[0])
    return torch.cat([_attend_part(queries[part.rows], cache, part) for part in layout.parts])


def _attend_part(queries: Tensor, cache: Tensor, part: Part) -> Tensor:
    length, n_heads, head_dim = queries.shape
    keys, values = cache[part.slot, : part.end].permute(1, 2, 0, 3)  # each [kv_heads, end, head_dim]
    kv_heads = keys.shape[0]
    group = n_heads // kv_heads
    if length == 1:  # a decode step: the group's heads are the rows of one small product
        grouped = queries.view(1, kv_heads, group, head_dim)
        out = functional.scaled_dot_product_attention(grouped, keys[None], values[None])
        return out.view(1, n_heads * head_dim)
    grouped = queries.view(length, kv_heads, group, head_dim).permute(1, 2, 0, 3)
    shared = (kv_heads, group, part.end, head_dim)
    out = functional.scaled_dot_product_attention(
        grouped,
        keys[:, None].expand(shared),
        values[:, None].expand(shared),
        attn_mask=part.mask,
        is_causal=part.mask is None,
    )
    return out.permute(2, 0, 1, 3).reshape(length, n_heads * head_dim)


def attend_fully(queries: Tensor, keys: Tensor, values: Tensor, out: Tensor) -> Generator[None, None, None]:
    """Attention of every token to every token, yielding after every small part of it.

    queries, keys, values: [heads, tokens, head_dim]; out: [tokens, heads, head_dim]. May overwrite `keys`.

    In bfloat16 on CPUs as blocks of two products and a softmax: 1.3 to 1.6 times as fast there as torch's fused kernel
    (benchmarks/attention.py). Scores are rounded to bfloat16 then, as in transformers' eager attention; taking the mean
    key away first, which no softmax notices, keeps them small and the rounding harmless (arXiv:2410.02367, 3.2).
    """
    heads, tokens, head_dim = queries.shape
    blocked = queries.dtype == torch.bfloat16 and queries.device.type == "cpu"
    n_heads, n_rows = heads, max(64, 2 * SCORES // tokens)
    if blocked:
        keys = keys.sub_(keys.mean(1, keepdim=True)).mul_(head_dim**-0.5).transpose(1, 2)
        n_heads, n_rows = max(1, SCORES // tokens**2), max(64, SCORES // tokens)
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
