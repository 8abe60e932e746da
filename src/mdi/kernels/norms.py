"""Norms by the kernels of this CPU: the binding of `c/norms.h`."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from ctypes import c_float, c_int32, c_int64, c_void_p
from typing import Any

from torch import Tensor

from mdi.kernels.library import library
from mdi.kernels.packed import FLOATS


class Norm(ctypes.Structure):
    """`Norm` of `c/norms.h`."""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "out", "weight", "bias", "residual")),
        *((name, c_int64) for name in ("rows", "size")),
        ("eps", c_float),
        ("dtype", c_int32),
    )


def compute(x: Tensor) -> bool:
    """Whether kernels compute the norms of x."""
    return x.device.type == "cpu" and x.dtype in FLOATS and library() is not None


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """residual + RMSNorm of the last dimension, in float32, rounded once. residual: like x. weight: float32 [size]."""
    return _norm("rms_norm", x, weight, None, eps, residual)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last dimension, in float32. weight, bias: float32 [size]."""
    return _norm("layer_norm", x, weight, bias, eps)


def _norm(
    kind: str, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None = None
) -> Tensor:
    x = x.contiguous()
    if residual is not None:
        assert (residual.shape, residual.dtype) == (x.shape, x.dtype)
        residual = residual.contiguous()
    out = x.new_empty(x.shape)
    call = Norm(
        x=x.data_ptr(),
        out=out.data_ptr(),
        weight=weight.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        residual=None if residual is None else residual.data_ptr(),
        rows=x.numel() // len(weight),
        size=len(weight),
        eps=eps,
        dtype=FLOATS[x.dtype],
    )
    _kernel(kind)(ctypes.byref(call))
    return out


@functools.cache
def _kernel(kind: str) -> Callable[..., Any]:
    found = library()
    assert found is not None
    return found.kernel(kind, ctypes.POINTER(Norm))
