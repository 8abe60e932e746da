"""Mixtures of experts by the kernels of this CPU: the binding of `c/experts.h`."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from ctypes import c_int, c_int32, c_int64, c_long, c_void_p
from typing import Any

from torch import Tensor

from mdi.core.group import InputShards
from mdi.kernels.library import library
from mdi.kernels.packed import FLOATS, PackedWeight, Shards, packed_shards


class Experts(ctypes.Structure):
    """`Experts` of `c/experts.h`."""

    _fields_ = (
        *((name, c_void_p) for name in ("router", "gate_up", "down")),
        *((name, c_int64) for name in ("count", "per_row")),
        ("normalised", c_int32),
    )


class PackedExperts:
    """The weights of a mixture of experts, as kernels are given them.

    router: [experts, hidden_size]. gate_up, down: of each expert, the first with a gate. per_row: experts that a row is
    computed with. normalised: whether their shares add up to 1.
    """

    def __init__(
        self,
        router: PackedWeight,
        gate_up: Sequence[PackedWeight],
        down: Sequence[PackedWeight],
        *,
        per_row: int,
        normalised: bool,
    ) -> None:
        self._kept = [router, *gate_up, *down]  # whose memory the addresses are of
        self._arrays = [(c_void_p * len(part))(*(weight.address for weight in part)) for part in (gate_up, down)]
        self._structure = Experts(router.address, *map(ctypes.addressof, self._arrays), len(down), per_row, normalised)

    @property
    def address(self) -> int:
        """Of the C structure, which lives as long as this object."""
        return ctypes.addressof(self._structure)

    def __call__(self, x: Tensor, residual: Tensor | None = None, shards: InputShards | None = None) -> Tensor:
        """residual + the sum over each row's experts: [rows, hidden_size] -> the same, in the dtype of x.

        shards: of each expert's inner width; the sum over a row's experts is rounded for each, then they are added.
        """
        out = x.new_empty(x.shape)
        self._run(x, out, None if residual is None else residual.contiguous(), shards)
        return out

    def partials(self, x: Tensor, shards: InputShards, out: Tensor) -> None:
        """The sum over each row's experts for each shard by itself. out: contiguous [shards, rows, hidden_size]."""
        assert out.is_contiguous()
        self._run(x, out, None, shards, out.stride(0))

    def _run(
        self, x: Tensor, out: Tensor, residual: Tensor | None, shards: InputShards | None, shard_stride: int = 0
    ) -> None:
        x = x.contiguous()
        added = None if residual is None else residual.data_ptr()
        addresses = (self.address, x.data_ptr(), out.data_ptr(), added)
        cut = ctypes.byref(packed_shards(shards)) if shards else None
        if _kernel()(*addresses, len(x), FLOATS[x.dtype], cut, shard_stride):
            raise MemoryError(f"no memory for a mixture of experts of {len(x)} rows")


@functools.cache
def _kernel() -> Callable[..., Any]:
    found = library()
    assert found is not None
    return found.kernel("mixture", *(c_void_p,) * 4, c_long, c_int, ctypes.POINTER(Shards), c_int64, result=c_int)
