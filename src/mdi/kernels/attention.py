"""Attention over the KV cache by the kernels of this CPU. Shapes and layouts: `c/attention.c`."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mdi.kernels.library import library

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
"""How kernels are told dtypes: `vector.h`."""


class Attention(ctypes.Structure):
    """`Attention` of `c/attention.h`."""

    _fields_ = (
        ("queries", ctypes.c_void_p),
        ("cache", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("runs", ctypes.c_void_p),
        ("n_runs", ctypes.c_int64),
        ("query_stride", ctypes.c_int64),
        ("slot_rows", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("cache_dtype", ctypes.c_int32),
    )


def works_on(device: torch.device) -> bool:
    """Whether attention on this device is computed by a kernel."""
    return device.type == "cpu" and _kernel() is not None


def attend(queries: Tensor, cache: Tensor, runs: Tensor) -> Tensor:
    """Causal attention of each run's rows over its slot. A row's bits depend on its slot's contents alone.

    queries: [rows, heads, head_dim]; a row's heads lie together. cache: [slots, rows, 2, kv_heads, head_dim], with the
    keys and values of these rows in it. runs: int64 [runs, 4]: first row, slot, position, rows. Returns
    [rows, heads * head_dim].
    """
    rows, heads, head_dim = queries.shape
    assert queries.stride()[1:] == (head_dim, 1)
    assert cache.is_contiguous()
    assert runs.is_contiguous()
    out = queries.new_empty(rows, heads * head_dim)
    call = Attention(
        queries=queries.data_ptr(),
        cache=cache.data_ptr(),
        out=out.data_ptr(),
        runs=runs.data_ptr(),
        n_runs=len(runs),
        query_stride=queries.stride(0),
        slot_rows=cache.shape[1],
        heads=heads,
        kv_heads=cache.shape[3],
        head_dim=head_dim,
        dtype=DTYPES[queries.dtype],
        cache_dtype=DTYPES[cache.dtype],
    )
    kernel = _kernel()
    assert kernel is not None
    kernel(ctypes.byref(call))
    return out


@functools.cache
def _kernel() -> Callable[..., Any] | None:
    found = library()
    return found.kernel("attention", ctypes.POINTER(Attention)) if found else None
