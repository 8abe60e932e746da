"""Attention, and the rotation of queries and keys, by the kernels of this CPU: the binding of `c/attention.h` and
`c/rotary.h`."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from ctypes import c_float, c_int, c_int32, c_int64, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from mdi.kernels.library import Library, library
from mdi.kernels.packed import FLOATS

CACHE_DTYPES = {**FLOATS, torch.int8: 3}


class Attention(ctypes.Structure):
    """`Attention` of `c/attention.h`."""

    _fields_ = (
        *((name, c_void_p) for name in ("queries", "keys", "values", "key_scales", "value_scales", "out", "runs")),
        *((name, c_int64) for name in ("n_runs", "query_stride", "key_stride", "slot_rows")),
        *((name, c_int64) for name in ("heads", "kv_heads", "head_dim")),
        *((name, c_int32) for name in ("dtype", "cache_dtype", "causal")),
        ("window", c_int64),
        *((name, c_void_p) for name in ("scratch", "claimed")),
    )


class Rotary(ctypes.Structure):
    """`Rotary` of `c/rotary.h`."""

    _fields_ = (
        *((name, c_void_p) for name in ("heads", "cos", "sin", "q_norm", "k_norm", "cache", "scales", "runs")),
        *((name, c_int64) for name in ("n_runs", "rows", "slot_rows", "n_heads", "kv_heads", "head_dim")),
        ("eps", c_float),
        *((name, c_int32) for name in ("dtype", "cache_dtype")),
    )


@dataclass(frozen=True)
class Kernels:
    """The functions of this process's instruction set."""

    attention: Callable[..., int]
    rotate: Callable[..., None]

    @classmethod
    def of(cls, found: Library) -> Kernels:
        attention = found.kernel("attention", ctypes.POINTER(Attention), result=c_int)
        return cls(attention, found.kernel("rotate", ctypes.POINTER(Rotary)))


@functools.cache
def kernels() -> Kernels | None:
    """None where there is no library."""
    found = library()
    return None if found is None else Kernels.of(found)


def works_on(device: torch.device) -> bool:
    """Whether attention on this device is computed by kernels."""
    return device.type == "cpu" and kernels() is not None


def attend(queries: Tensor, cache: Tensor, runs: Tensor, scales: Tensor | None = None, *, window: int = 0) -> Tensor:
    """Causal attention of each run's rows over its slot. A row's bits depend on its slot's contents alone.

    queries: [rows, heads, head_dim]; a row's heads lie together. cache: [slots, rows, 2, kv_heads, head_dim], with the
    keys and values of these rows in it. scales: of an int8 cache, float32 [slots, rows, 2, kv_heads]. runs: int64
    [runs, 4]: first row, slot, position, rows. window: the last keys that a row attends to, its own included; 0 is all.
    Returns [rows, heads * head_dim].
    """
    rows, heads, head_dim = queries.shape
    kv_heads = cache.shape[3]
    assert queries.stride()[1:] == (head_dim, 1)
    assert cache.is_contiguous()
    out = queries.new_empty(rows, heads * head_dim)
    call = Attention(
        queries=queries.data_ptr(),
        keys=cache.data_ptr(),
        values=cache.data_ptr() + kv_heads * head_dim * cache.itemsize,
        key_scales=None if scales is None else scales.data_ptr(),
        value_scales=None if scales is None else scales.data_ptr() + kv_heads * scales.itemsize,
        query_stride=queries.stride(0),
        key_stride=2 * kv_heads * head_dim,
        slot_rows=cache.shape[1],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=FLOATS[queries.dtype],
        cache_dtype=CACHE_DTYPES[cache.dtype],
        causal=1,
        window=window,
    )
    _attend(call, runs, out)
    return out


def attend_fully(qkv: Tensor, rows: slice, frame_rows: int, out: Tensor) -> None:
    """Attention of some rows to all rows of their frame.

    qkv: [frames * frame_rows, 3, heads, head_dim]: queries, keys, values. rows: within one frame. out: the rows'
    [rows, heads * head_dim].
    """
    _, _, heads, head_dim = qkv.shape
    assert qkv.is_contiguous()
    assert out.is_contiguous()
    size_bytes = heads * head_dim * qkv.itemsize
    call = Attention(
        queries=qkv.data_ptr() + rows.start * 3 * size_bytes,
        keys=qkv.data_ptr() + size_bytes,
        values=qkv.data_ptr() + 2 * size_bytes,
        query_stride=3 * heads * head_dim,
        key_stride=3 * heads * head_dim,
        slot_rows=frame_rows,
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        dtype=FLOATS[qkv.dtype],
        cache_dtype=FLOATS[qkv.dtype],
    )
    _attend(call, torch.tensor([[0, rows.start // frame_rows, 0, rows.stop - rows.start]]), out)


def _attend(call: Attention, runs: Tensor, out: Tensor) -> None:
    assert runs.dtype == torch.int64
    assert runs.is_contiguous()
    call.out, call.runs, call.n_runs = out.data_ptr(), runs.data_ptr(), len(runs)
    found = kernels()
    assert found is not None
    if found.attention(ctypes.byref(call)):
        raise MemoryError(f"no memory for the attention of {len(out)} rows")


def rotate(
    heads: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    runs: Tensor,
    cache: Tensor | None = None,
    scales: Tensor | None = None,
    *,
    n_kv_heads: int,
    norms: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
) -> None:
    """Rotates queries in place, and keys in place or into a cache, with the values behind them.

    heads: [rows, queries + keys + values, head_dim]. cos, sin: float32 [rows, head_dim / 2]; None where nothing is
    rotated, only normalised and written. norms: RMSNorm of queries and keys before, float32 [head_dim] each. runs,
    cache, scales: as for `attend`.
    """
    rows, n_heads, head_dim = heads.shape
    assert heads.is_contiguous()
    assert cos is None or cos.is_contiguous()
    assert sin is None or sin.is_contiguous()
    call = Rotary(
        heads=heads.data_ptr(),
        cos=None if cos is None else cos.data_ptr(),
        sin=None if sin is None else sin.data_ptr(),
        q_norm=norms[0].data_ptr() if norms else None,
        k_norm=norms[1].data_ptr() if norms else None,
        cache=None if cache is None else cache.data_ptr(),
        scales=None if scales is None else scales.data_ptr(),
        runs=runs.data_ptr(),
        n_runs=len(runs),
        rows=rows,
        slot_rows=0 if cache is None else cache.shape[1],
        n_heads=n_heads - 2 * n_kv_heads,
        kv_heads=n_kv_heads,
        head_dim=head_dim,
        eps=eps,
        dtype=FLOATS[heads.dtype],
        cache_dtype=CACHE_DTYPES[heads.dtype if cache is None else cache.dtype],
    )
    found = kernels()
    assert found is not None
    found.rotate(ctypes.byref(call))
