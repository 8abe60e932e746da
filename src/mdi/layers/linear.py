"""Matrix products, with weights in the layout that is fastest on their device.

On CPUs a bfloat16 or float32 weight is reordered once into oneDNN's blocked layout: few rows then read up to 3 times as
many bytes a second as through `torch.nn.functional.linear`, many rows are no slower, and a float32 row has the same
bits whatever their number (docs/decisions.md). Where the operators are missing or give other numbers, the plain product
is used.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cache
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

from mdi.core.quantization import QuantizedTensor
from mdi.core.tensors import GetTensor
from mdi.layers.quantize import dequantize

log = logging.getLogger(__name__)

ROW_STEPS = (1, 2, 4, 8)  # more rows in place of one would cost more than equal bits are worth
TRIED_TIMES = (1, 2, 3, 5, 6, 7, 9, 11, 13, 17, 25)
TRIED_SHAPE = (128, 512)  # outputs, inputs: on the machines measured, what is computed otherwise depends on neither
PACKED_DTYPES = {torch.bfloat16: 0.25, torch.float32: 1e-4}  # and how far a product near 50 may be from the plain one
PACKED_ROWS = 16  # the blocked layout is chosen for so many rows: what decode steps bring


class Linear:
    """y = x W^T + b, with the weight as it is stored: [out, in].

    row_step: rows are filled up with zeros to a multiple, so that the bits of a row do not depend on their number.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, row_step: int = 1) -> None:
        self.weight = weight
        self.bias = bias
        self.row_step = row_step

    @staticmethod
    def load(get: GetTensor, outputs: Mapping[str, int], *inputs: int, bias: bool = False) -> Linear:
        """Loads weights that share their inputs as one product, in the layout for their dtype and device.

        outputs: number of outputs by name, in order. inputs: shape of the weights' other dimensions, flat in the
        product. bias: whether each weight has one. `NAME.weight` and `NAME.bias` are the tensors.
        """
        weights, biases = list[Tensor](), list[Tensor]()
        for name, size in outputs.items():
            weights.append(_dense(get.matrix(f"{name}.weight", (size, *inputs)), get.dtype))
            if bias:
                biases.append(get(f"{name}.bias", (size,)))
        weight = _joined(weights)
        on_cpu = weight.device.type == "cpu"
        kind = PackedLinear if on_cpu and _packing_works(weight.dtype) else Linear
        step = row_step(kind, weight.dtype, torch.get_num_threads()) if on_cpu else 1
        return kind(weight, _joined(biases) if bias else None, step)

    def __call__(self, x: Tensor) -> Tensor:
        """x: [rows, in] -> [rows, out]."""
        missing = -len(x) % self.row_step
        return self._product(_filled(x, missing))[: len(x)] if missing else self._product(x)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + x W^T + b, in one pass where the layout can. residual: [rows, out]; left as it is."""
        missing = -len(x) % self.row_step
        if missing:
            return self._sum(_filled(residual, missing), _filled(x, missing))[: len(x)]
        return self._sum(residual, x)

    def _product(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)

    def _sum(self, residual: Tensor, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias).add_(residual)


class PackedLinear(Linear):
    """`Linear` with its weight in oneDNN's blocked layout: bfloat16 or float32."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, row_step: int = 1) -> None:
        reordered = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_ROWS)
        super().__init__(cast(Tensor, reordered), bias, row_step)

    def _product(self, x: Tensor) -> Tensor:
        return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], ""))

    def _sum(self, residual: Tensor, x: Tensor) -> Tensor:
        fused = torch.ops.mkldnn._linear_pointwise.binary
        return cast(Tensor, fused(x, residual, self.weight, self.bias, "add"))


def _dense(weight: Tensor | QuantizedTensor, dtype: torch.dtype) -> Tensor:
    return dequantize(weight, dtype) if isinstance(weight, QuantizedTensor) else weight.flatten(1)


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(tensors)) if len(tensors) > 1 else tensors[0]


def _filled(x: Tensor, missing: int) -> Tensor:
    return functional.pad(x, (0, 0, 0, missing))


@cache
def row_step(kind: type[Linear], dtype: torch.dtype, n_threads: int) -> int:  # noqa: ARG001
    """The smallest step such that a product of any multiple of it gives a row the same bits.

    Libraries compute few rows, or the last rows that a thread gets, otherwise than many. Tried with this machine's CPU
    and so many threads, once for a process. 1 where there is no such step, which is logged.
    """
    generator = torch.Generator().manual_seed(0)
    weight, x, residual = (
        torch.randn(shape, generator=generator).to(dtype) for shape in (TRIED_SHAPE, (128, TRIED_SHAPE[1]), (128, 128))
    )
    linear = kind(weight)
    product, total = linear._product(x), linear._sum(residual, x)

    def agrees(rows: int) -> bool:
        added = linear._sum(residual[:rows], x[:rows])
        return torch.equal(linear._product(x[:rows]), product[:rows]) and torch.equal(added, total[:rows])

    for step in ROW_STEPS:
        if all(agrees(min(step * times, 128)) for times in TRIED_TIMES):
            return step
    log.warning("products in %s round by the number of rows here: a replay may give another text", dtype)
    return 1


@cache
def _packing_works(dtype: torch.dtype) -> bool:
    """Whether oneDNN has this dtype here: its operators are tried on a small product against the plain one."""
    if dtype not in PACKED_DTYPES:
        return False
    try:
        generator, near = torch.Generator().manual_seed(0), PACKED_DTYPES[dtype]
        weight, x = (torch.randn(rows, 64, generator=generator).to(dtype) for rows in (32, 3))
        packed, plain = PackedLinear(weight), functional.linear(x, weight)
        once = packed(x)
        twice = packed.add_to(once, x)
        return torch.allclose(once, plain, atol=near) and torch.allclose(twice, plain + plain, atol=2 * near)
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
