"""Matrix products with weights laid out for the machine. Knows shapes and dtypes, nothing of the model around them.

On CPUs a bfloat16 weight is reordered once into oneDNN's blocked layout: one row then reads 1.3 to 2 times as many
bytes a second as through `torch.nn.functional.linear`, and many rows are no slower (docs/performance.md). Where the
operators are missing or give other numbers, the plain product is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

PACKED_ROWS = 16  # rows the blocked layout is chosen for: what decode steps bring


class Linear:
    """y = x W^T + b. Several weights given together become one product over their rows, side by side."""

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor] = ()) -> None:
        """weights: each [out_i, in]; biases: each [out_i], or none at all."""
        weight = torch.cat(list(weights)) if len(weights) > 1 else weights[0]
        self.bias = torch.cat(list(biases)) if biases else None
        self.packed = weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and _packing_works()
        self.weight = (
            cast(Tensor, torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_ROWS)) if self.packed else weight
        )

    def __call__(self, x: Tensor) -> Tensor:
        """x: [rows, in] -> [rows, out]."""
        if self.packed:
            return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], ""))
        return functional.linear(x, self.weight, self.bias)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + x W^T + b, in one pass where packed. residual: [rows, out]; left as it is."""
        if self.packed:
            fused = torch.ops.mkldnn._linear_pointwise.binary
            return cast(Tensor, fused(x, residual, self.weight, self.bias, "add"))
        return functional.linear(x, self.weight, self.bias).add_(residual)


@cache
def _packing_works() -> bool:
    """Tries the oneDNN operators on a small product and compares with the plain one."""
    try:
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(32, 64, generator=generator).bfloat16()
        x = torch.randn(3, 64, generator=generator).bfloat16()
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_ROWS)
        plain = functional.linear(x, weight)
        once = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
        twice = torch.ops.mkldnn._linear_pointwise.binary(x, once, packed, None, "add")
        return torch.allclose(once, plain, atol=0.25) and torch.allclose(twice, plain + plain, atol=0.5)
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
