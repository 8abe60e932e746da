"""Matrix products, with weights in the layout that is fastest on their device.

On CPUs a bfloat16 weight is reordered once into oneDNN's blocked layout: one row then reads 1.3 to 2 times as many
bytes a second as through `torch.nn.functional.linear`, and many rows are no slower (docs/performance.md). Where the
operators are missing or give other numbers, the plain product is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

from mdi.core.tensors import GetTensor

PACKED_ROWS = 16  # the blocked layout is chosen for so many rows: what decode steps bring


class Linear:
    """y = x W^T + b, with the weight as it is stored: [out, in]."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias

    @staticmethod
    def load(get: GetTensor, outputs: Mapping[str, int], *inputs: int, bias: bool = False) -> Linear:
        """Loads weights that share their inputs as one product, in the layout for their dtype and device.

        outputs: number of outputs by name, in order. inputs: shape of the weights' other dimensions, flat in the
        product. bias: whether each weight has one. `NAME.weight` and `NAME.bias` are the tensors.
        """
        weights, biases = list[Tensor](), list[Tensor]()
        for name, size in outputs.items():
            weights.append(get(f"{name}.weight", (size, *inputs)).flatten(1))
            if bias:
                biases.append(get(f"{name}.bias", (size,)))
        weight = _joined(weights)
        packed = weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and _packing_works()
        return (PackedLinear if packed else Linear)(weight, _joined(biases) if bias else None)

    def __call__(self, x: Tensor) -> Tensor:
        """x: [rows, in] -> [rows, out]."""
        return functional.linear(x, self.weight, self.bias)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + x W^T + b, in one pass where the layout can. residual: [rows, out]; left as it is."""
        return functional.linear(x, self.weight, self.bias).add_(residual)


class PackedLinear(Linear):
    """`Linear` with a bfloat16 weight in oneDNN's blocked layout."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(cast(Tensor, torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_ROWS)), bias)

    def __call__(self, x: Tensor) -> Tensor:
        return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], ""))

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        fused = torch.ops.mkldnn._linear_pointwise.binary
        return cast(Tensor, fused(x, residual, self.weight, self.bias, "add"))


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(tensors)) if len(tensors) > 1 else tensors[0]


@cache
def _packing_works() -> bool:
    """Tries the oneDNN operators on a small product and compares with the plain one."""
    try:
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(32, 64, generator=generator).bfloat16()
        x = torch.randn(3, 64, generator=generator).bfloat16()
        packed, plain = PackedLinear(weight), functional.linear(x, weight)
        once = packed(x)
        twice = packed.add_to(once, x)
        return torch.allclose(once, plain, atol=0.25) and torch.allclose(twice, plain + plain, atol=0.5)
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
