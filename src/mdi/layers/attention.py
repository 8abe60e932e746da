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
from mdi.layers.norm import RMSNorm
from mdi.layers.rope import Rotation

SCORES_AT_ONCE = 2**21
"""Scores of one head that a vision tower computes before it yields."""

MIN_ROWS = 96
TINY = torch.finfo(torch.float32).tiny

Norms = tuple[RMSNorm, RMSNorm]


@dataclass(frozen=True)
class Layout:
    """Where a batch's rows are in the KV cache, computed once for all layers.

    runs: int64 [sequences, 4]: first row, slot, position, rows. For torch alone, empty where kernels compute: places,
    slot and row of each token, int64 [tokens] both; masks, bool [rows, keys] of each run, None where none or a causal
    one is enough.
    """

    runs: Tensor
    places: tuple[Tensor, ...] = ()
    masks: tuple[Tensor | None, ...] = ()

    @classmethod
    def of(cls, slices: Sequence[Slice], device: torch.device) -> Layout:
        runs, first = list[tuple[int, int, int, int]](), 0
        for part in slices:
            runs.append((first, part.slot, part.start, part.length))
            first += part.length
        made = torch.tensor(runs, dtype=torch.int64).view(-1, 4)
        if kernels.works_on(device):
            return cls(made)
        slots = [part.slot for part in slices for _ in range(part.length)]
        rows = [row for part in slices for row in range(part.start, part.end)]
        places = torch.tensor(slots, device=device), torch.tensor(rows, device=device)
        return cls(made, places, tuple(_mask(part.start, part.length, 0, device) for part in slices))


def _mask(start: int, length: int, window: int, device: torch.device) -> Tensor | None:
    """Row i attends to key j where j <= start + i, and j > start + i - window where there is one."""
    end = start + length
    slides = 0 < window < end
    if not slides and (start == 0 or length == 1):
        return None
    mask = torch.ones(length, end, dtype=torch.bool, device=device).tril_(start)
    return mask.triu_(start + 1 - window) if slides else mask


def rotate(
    qkv: Tensor,
    rotation: Rotation | None,
    cache: Tensor,
    layout: Layout,
    norms: Norms | None = None,
    scales: Tensor | None = None,
) -> Tensor:
    """Rotates a batch's queries and keys, and writes its keys and values to its slots. Returns the queries.

    qkv: [tokens, queries + keys + values, head_dim], overwritten. rotation: None where a layer does not rotate. cache:
    one layer's [slots, length, 2, n_kv_heads, head_dim]. norms: of each head's queries and keys, before they are
    rotated. scales: of an int8 cache.
    """
    n_kv_heads = cache.shape[3]
    n_heads = qkv.shape[1] - 2 * n_kv_heads
    if kernels.works_on(qkv.device):
        exact = (norms[0].exact, norms[1].exact) if norms else None
        eps = norms[0].eps if norms else 0.0
        cos, sin = (rotation.cos, rotation.sin) if rotation else (None, None)
        kernels.rotate(qkv, cos, sin, layout.runs, cache, scales, n_kv_heads=n_kv_heads, norms=exact, eps=eps)
        return qkv[:, :n_heads]
    rotated, values = qkv.tensor_split((n_heads + n_kv_heads,), dim=1)
    if norms:
        rotated = torch.cat((norms[0](rotated[:, :n_heads]), norms[1](rotated[:, n_heads:])), dim=1)
    if rotation:
        rotated = rotation(rotated)
    written = torch.stack((rotated[:, n_heads:], values), dim=1)
    if scales is not None:
        scale = written.float().abs().amax(-1) / 127
        scales[layout.places] = scale
        written = (written.float() / scale.clamp_min(TINY)[..., None]).round().to(torch.int8)
    cache[layout.places] = written
    return rotated[:, :n_heads]


def attend(queries: Tensor, cache: Tensor, layout: Layout, scales: Tensor | None = None, *, window: int = 0) -> Tensor:
    """Attention of every slice over its own slot.

    queries: [tokens, n_heads, head_dim]; cache: one layer's [slots, length, 2, n_kv_heads, head_dim], with the keys
    and values of the batch in it. Returns [tokens, n_heads * head_dim]. Query heads share key heads in groups (GQA,
    arXiv:2305.13245). scales: of an int8 cache, float32 [slots, length, 2, n_kv_heads]. window: the last keys that a
    query attends to, its own included; 0 is all.
    """
    if kernels.works_on(queries.device):
        return kernels.attend(queries, cache, layout.runs, scales, window=window)

    def kept(slot: int, end: int) -> Tensor:
        if scales is None:
            return cache[slot, :end]
        return (cache[slot, :end] * scales[slot, :end, ..., None]).to(queries.dtype)

    made = []
    for (row, slot, start, length), causal in zip(layout.runs.tolist(), layout.masks, strict=True):
        mask = _mask(start, length, window, queries.device) if window else causal
        made.append(_attend_run(queries[row : row + length], kept(slot, start + length), mask))
    return made[0] if len(made) == 1 else torch.cat(made)


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


def rotate_in_place(qkv: Tensor, rotation: Rotation) -> None:
    """Rotates queries and keys of a vision tower. qkv: [tokens, 3, heads, head_dim]."""
    tokens, _, heads, head_dim = qkv.shape
    if kernels.works_on(qkv.device):
        runs = torch.tensor([[0, 0, 0, tokens]])
        kernels.rotate(qkv.view(tokens, 3 * heads, head_dim), rotation.cos, rotation.sin, runs, n_kv_heads=heads)
    else:
        rotated = qkv[:, :2].flatten(1, 2)
        qkv[:, :2] = rotation(rotated).view(tokens, 2, heads, head_dim)


def attend_fully(qkv: Tensor, sizes: Sequence[int], out: Tensor) -> Generator[None, None, None]:
    """Attention of every token to every token of its part. Yields between small parts of the work.

    qkv: [tokens, 3, heads, head_dim], part after part. sizes: tokens of each part. out: [tokens, heads * head_dim].
    """
    first = scores = 0
    for size in sizes:
        part, part_out = qkv[first : first + size], out[first : first + size]
        step = max(MIN_ROWS, SCORES_AT_ONCE // size)
        for start in range(0, size, step):
            rows = slice(start, min(start + step, size))
            _attend_rows(part, rows, part_out[rows])
            scores += (rows.stop - rows.start) * size
            if scores >= SCORES_AT_ONCE or rows.stop - rows.start == step:
                scores = 0
                yield
        first += size


def _attend_rows(qkv: Tensor, rows: slice, out: Tensor) -> None:
    """Some rows of one part to all of it."""
    if kernels.works_on(qkv.device):
        kernels.attend_fully(qkv, rows, len(qkv), out)
        return
    queries, keys, values = qkv.permute(1, 2, 0, 3)
    attended = functional.scaled_dot_product_attention(queries[None, :, rows], keys[None], values[None])[0]
    out.copy_(attended.transpose(0, 1).flatten(1))
