"""Weights packed for this CPU, and their products with any number of rows: the binding of `c/products.h`.

The bits of a row do not depend on the number of rows or of threads: every output has one float32 accumulator, to which
the inputs are added in order.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Callable
from ctypes import c_int, c_int64, c_long, c_void_p
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mdi.core.group import InputShards
from mdi.core.quantization import Quantization, QuantizedTensor
from mdi.kernels.library import Library, library

FLOATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
INT_KINDS = {8: 3, 4: 4}  # by bits
ACTIVATIONS = {"none": 0, "gelu": 1, "quick_gelu": 2, "tanh_gelu": 3, "silu": 4}


class Shards(ctypes.Structure):
    """`Shards` of `c/products.h`."""

    _fields_ = (("count", c_int64), ("step", c_int64), ("bounds", ctypes.POINTER(c_int64)))


@functools.lru_cache(maxsize=256)
def packed_shards(shards: InputShards) -> Shards:
    """As kernels are given them."""
    bounds = (c_int64 * len(shards.bounds))(*shards.bounds)
    return Shards(shards.count, shards.step, bounds)


@dataclass(frozen=True)
class Kernels:
    """The functions of one instruction set."""

    pack: Callable[..., int | None]
    discard: Callable[[int], None]
    product: Callable[..., int]

    @staticmethod
    def of(loaded: Library) -> Kernels:
        flags: tuple[type[Any], ...] = (c_long, c_long, c_int, c_int, c_int, c_int)
        pointers: tuple[type[Any], ...] = (*(c_void_p,) * 5, ctypes.POINTER(c_int))
        operands: tuple[type[Any], ...] = (c_void_p, c_void_p, c_void_p, c_long, c_int, c_void_p, c_void_p)
        return Kernels(
            loaded.kernel("pack", *flags, *pointers, result=c_void_p),
            loaded.kernel("discard", c_void_p),
            loaded.kernel("product", *operands, c_int, ctypes.POINTER(Shards), c_int64, result=c_int),
        )


@functools.cache
def fastest() -> Kernels:
    """Those of this process's library, which there must be."""
    loaded = library()
    assert loaded is not None, "without a library there is nothing to pack for"
    return Kernels.of(loaded)


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight [outputs, inputs] in the layout of this CPU's kernels.

    quantization: None for float weights. gate: its activation, where gate and up are one half of the
    outputs each, and become one product; or none.
    address: of the C structure, freed with this object.
    """

    kernels: Kernels
    shape: tuple[int, int]
    quantization: Quantization | None
    gate: str
    address: int

    @staticmethod
    def pack(weight: Tensor | QuantizedTensor, *, gate: str = "none", kernels: Kernels | None = None) -> PackedWeight:
        """A packed copy.

        Raises ValueError for numbers that are NaN, for inputs that are no multiple of the group, for an order of others
        than these inputs, and where the weight has no place in memory.
        """
        kernels = kernels or fastest()
        (kind, group, group_scales), arrays = _arrays(weight)
        pointers = [None if array is None else array.data_ptr() for array in arrays]
        (outputs, inputs), has_nan = weight.shape, c_int()
        flags = kind, group, ACTIVATIONS[gate], group_scales
        address = kernels.pack(outputs, inputs, *flags, *pointers, ctypes.byref(has_nan))
        if not address:
            raise ValueError("there is no memory for its packed copy")
        quantization = weight.quantization if isinstance(weight, QuantizedTensor) else None
        packed = PackedWeight(kernels, (outputs, inputs), quantization, gate, address)
        weakref.finalize(packed, kernels.discard, address)
        if has_nan:
            raise ValueError("it has numbers that are NaN")
        return packed

    @property
    def width(self) -> int:
        """Outputs of a product: half as many with a gate."""
        return self.shape[0] if self.gate == "none" else self.shape[0] // 2


def _arrays(weight: Tensor | QuantizedTensor) -> tuple[tuple[int, int, bool], tuple[Tensor | None, ...]]:
    """(kind, activation group, whether scales are per group), arrays of the weight, as kernels take them."""
    if isinstance(weight, Tensor):
        return (FLOATS[weight.dtype], 0, False), (weight.contiguous(), None, None, None, None)
    quantization, (outputs, inputs) = weight.quantization, weight.shape
    group = quantization.activation_group
    if inputs % group or (quantization.group or group) % group:
        raise ValueError(f"its {inputs} inputs are no multiple of the group of {max(group, quantization.group or 0)}")
    assert quantization.bits == 4 or weight.zeros is None, "int8 has no zeros"
    assert quantization.group or weight.minimums is None, "only groups have minimums"
    repeats = quantization.group // group if quantization.group else 1  # a scale for every group of activations
    dtype = torch.float16 if quantization.bits == 4 else torch.float32
    scales = _of_groups(weight.scales, repeats, dtype)
    zeros, minimums = _of_groups(weight.zeros, repeats, torch.uint8), _of_groups(weight.minimums, repeats, dtype)
    groups = inputs // group if quantization.group else 1
    assert all(part is None or part.shape == (outputs, groups) for part in (scales, zeros, minimums))
    arrays = weight.values.contiguous(), scales, zeros, minimums, _order(weight)
    return (INT_KINDS[quantization.bits], group, quantization.group is not None), arrays


def _of_groups(numbers: Tensor | None, repeats: int, dtype: torch.dtype) -> Tensor | None:
    """One for each group of activations."""
    if numbers is None:
        return None
    return (numbers.repeat_interleave(repeats, 1) if repeats > 1 else numbers).to(dtype).contiguous()


def _order(weight: QuantizedTensor) -> Tensor | None:
    """Checked, because kernels trust it."""
    if weight.order is None:
        return None
    inputs, order = weight.shape[1], weight.order.to(torch.int32).contiguous()
    if order.shape != (inputs,) or not 0 <= int(order.min()) <= int(order.max()) < inputs:
        raise ValueError(f"the order of its inputs is not of {inputs} inputs")
    return order


def product(
    weight: PackedWeight,
    x: Tensor,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    shards: InputShards | None = None,
) -> Tensor:
    """residual + activation(x W^T + bias), rounded once: [rows, in] -> [rows, out] in the dtype of x.

    x: float32, bfloat16 or float16. bias: float32 [outputs]. residual: [rows, out], like x. activation: none, gelu,
    quick_gelu, tanh_gelu or silu; a gate is a property of the weight. shards: parts of the inputs, whose sums are
    rounded, then added in order. Quantised weights quantise x to int8, by row and group of inputs. Raises ValueError
    for shards that cut a group.
    """
    out = x.new_empty(len(x), weight.width)
    if residual is not None:
        assert (residual.shape, residual.dtype) == (out.shape, out.dtype)
        residual = residual.contiguous()
    if bias is not None:
        assert bias.shape == weight.shape[:1]
        bias = bias.float().contiguous()
    _multiply(weight, x, out, bias, residual, activation, shards)
    return out


def partial_products(weight: PackedWeight, x: Tensor, shards: InputShards, out: Tensor) -> None:
    """x W^T of each shard of the inputs by itself, as `product` adds them up. out: contiguous [shards, rows, out]."""
    assert (out.shape, out.dtype) == ((shards.count, len(x), weight.width), x.dtype)
    assert out.is_contiguous()
    _multiply(weight, x, out, None, None, "none", shards, shard_stride=out.stride(0))


def _multiply(
    weight: PackedWeight,
    x: Tensor,
    out: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    shards: InputShards | None,
    shard_stride: int = 0,
) -> None:
    rows, inputs = x.shape
    assert inputs == weight.shape[1], f"{inputs} inputs for a weight of {weight.shape[1]}"
    x = x.contiguous()
    step = weight.quantization.activation_group if weight.quantization else 2
    if shards and any(bound % step for bound in shards.bounds):
        raise ValueError(f"shards that end at {shards.bounds} cut groups of {step} inputs")
    failed = weight.kernels.product(
        weight.address,
        x.data_ptr(),
        out.data_ptr(),
        rows,
        FLOATS[x.dtype],
        None if bias is None else bias.data_ptr(),
        None if residual is None else residual.data_ptr(),
        ACTIVATIONS[activation],
        ctypes.byref(packed_shards(shards)) if shards else None,
        shard_stride,
    )
    if failed:
        raise MemoryError(f"no memory for a product of {rows} rows")
