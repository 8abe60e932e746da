"""Causal attention of a packed batch over the KV cache, and full attention for vision towers. Knows no weights.

On CPUs kernels compute it, and the bits of a row depend on its slot's contents alone (`mdi.kernels.attention`). On
other devices, and on machines without a library of kernels, torch does.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from mdi.core.batch import Slice
from mdi.kernels import attention as kernels

SCORES_AT_ONCE = 2**20
"""Attention scores that are computed at once, so that they stay in a CPU's cache."""


@dataclass(frozen=True)
class Layout:
    """Where a batch's rows are in the KV cache, computed once for all layers.

    runs: int64 [sequences, 4]: first row, slot, position, rows. slots, cache_rows: int64 [tokens]. masks: for torch,
    bool [rows, keys] of each run, None where none or a causal one is enough.
    """

    runs: Tensor
    slots: Tensor
    cache_rows: Tensor
    masks: tuple[Tensor | None, ...] = ()

    @classmethod
    def of(cls, slices: Sequence[Slice], device: torch.device) -> Layout:
        runs, first = list[tuple[int, int, int, int]](), 0
        slots, cache_rows = list[int](), list[int]()
        for part in slices:
            runs.append((first, part.slot, part.start, part.length))
            first += part.length
            slots += [part.slot] * part.length
            cache_rows += range(part.start, part.end)
        masks = () if kernels.works_on(device) else tuple(_mask(part, device) for part in slices)
        return cls(
            torch.tensor(runs, dtype=torch.int64).view(-1, 4),
            torch.tensor(slots, device=device),
            torch.tensor(cache_rows, device=device),
            masks,
        )

    def write(self, cache: Tensor, keys_values: Tensor) -> None:
        """Writes a batch's keys and values. cache: one layer's; keys_values: [tokens, 2, n_kv_heads, head_dim]."""
        cache[self.slots, self.cache_rows] = keys_values


def _mask(part: Slice, device: torch.device) -> Tensor | None:
    """Row i attends to key j where j <= start + i."""
    if part.start == 0 or part.length == 1:
        return None
    return torch.ones(part.length, part.end, dtype=torch.bool, device=device).tril_(part.start)


def attend(queries: Tensor, cache: Tensor, layout: Layout) -> Tensor:
    """Attention of every slice over its own slot.

    queries: [tokens, n_heads, head_dim]; cache: one layer's [slots, length, 2, n_kv_heads, head_dim], with the keys
    and values of the batch in it. Returns [tokens, n_heads * head_dim]. Query heads share key heads in groups (GQA,
    arXiv:2305.13245); nothing is copied out of the cache.
    """
    if kernels.works_on(queries.device):
        return kernels.attend(queries, cache, layout.runs)
    runs = zip(layout.runs.tolist(), layout.masks, strict=True)
    return torch.cat(
        [
            _attend_run(queries[row : row + length], cache[slot, : start + length], mask)
            for (row, slot, start, length), mask in runs
        ]
    )


def _attend_run(queries: Tensor, cache: Tensor, mask: Tensor | None) -> Tensor:
    """queries: [rows, n_heads, head_dim]; cache: [keys, 2, n_kv_heads, head_dim]."""
    length, n_heads, head_dim = queries.shape
    keys, values = cache.permute(1, 2, 0, 3)[:, :, None]  # each [kv_heads, 1, keys, head_dim]
    kv_heads = keys.shape[0]
    group = n_heads // kv_heads
    shared = (kv_heads, group, keys.shape[2], head_dim)
    out = functional.scaled_dot_product_attention(
        queries.view(length, kv_heads, group, head_dim).permute(1, 2, 0, 3),
        keys.expand(shared),
        values.expand(shared),
        attn_mask=mask,
        is_causal=mask is None and length > 1,
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
