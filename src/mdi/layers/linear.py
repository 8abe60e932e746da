"""Matrix products, with weights in the layout that is fastest on their device.

On CPUs a weight is packed once for our kernels (`kernels.packed`). Elsewhere, and without a library of kernels, torch
multiplies with the weight as it is stored.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from mdi.core.errors import CheckpointError
from mdi.core.group import InputShards
from mdi.core.quantization import QuantizedTensor
from mdi.core.tensors import GetTensor
from mdi.kernels.library import library
from mdi.kernels.packed import FLOATS, PackedWeight, partial_products, product
from mdi.layers.quantize import dequantize

log = logging.getLogger(__name__)

QUICK_GELU = 1.702
GATES = {"swiglu": "silu", "geglu": "tanh_gelu"}
"""Activations of products with a gate: that of the gate."""


class Linear:
    """y = activation(x W^T + b), with the weight as it is stored: [out, in].

    activation: none, gelu, quick_gelu (x * sigmoid(1.702 x), arXiv:1606.08415), tanh_gelu (its approximation with a
    tanh, in the same paper), or of a gate (arXiv:2002.05202): the outputs are a gate and as many others, and y is
    silu(gate) * other (swiglu) or tanh_gelu(gate) * other (geglu).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, activation: str = "none") -> None:
        self.weight = weight
        self.bias = bias
        self.activation = activation

    @staticmethod
    def load(
        get: GetTensor, outputs: Mapping[str, int], *inputs: int, bias: bool = False, activation: str = "none"
    ) -> Linear:
        """Loads weights that share their inputs as one product, in the layout for their dtype and device.

        outputs: number of outputs by name, in order. inputs: shape of the weights' other dimensions, flat in the
        product. bias: whether each weight has one. `NAME.weight` and `NAME.bias` are the tensors.
        Raises CheckpointError for a weight that cannot be computed with.
        """
        weight = _joined([get.matrix(f"{name}.weight", (size, *inputs)) for name, size in outputs.items()], get.dtype)
        joined_bias = _stacked([get(f"{name}.bias", (size,)) for name, size in outputs.items()]) if bias else None
        device = (weight.values if isinstance(weight, QuantizedTensor) else weight).device
        if device.type != "cpu" or get.dtype not in FLOATS or library() is None:
            if isinstance(weight, QuantizedTensor):
                _log_dequantized(str(get.dtype), device.type)
            return Linear(_dense(weight, get.dtype), joined_bias, activation)
        try:
            return PackedLinear(weight, joined_bias, activation)
        except ValueError as error:
            raise CheckpointError(f"{', '.join(f'{name}.weight' for name in outputs)}: {error}") from error

    def __call__(self, x: Tensor) -> Tensor:
        """x: [rows, in] -> [rows, out]."""
        made = functional.linear(x, self.weight, self.bias)
        if self.activation == "gelu":
            return functional.gelu(made)
        if self.activation == "tanh_gelu":
            return functional.gelu(made, approximate="tanh")
        if self.activation == "quick_gelu":  # through SiLU, which is one pass
            return functional.silu(made.mul_(QUICK_GELU), inplace=True).mul_(1 / QUICK_GELU)
        if self.activation in GATES:
            gate, others = made.chunk(2, dim=-1)
            is_silu = self.activation == "swiglu"
            return (functional.silu(gate) if is_silu else functional.gelu(gate, approximate="tanh")).mul_(others)
        return made

    def add_to(self, residual: Tensor, x: Tensor, shards: InputShards | None = None) -> Tensor:
        """residual + y, in one pass where the layout can. residual: [rows, out]; left as it is.

        shards: parts of the inputs whose sums are rounded, then added in order, in float32. For products without bias
        and activation.
        """
        if shards is None:
            return self(x).add_(residual)
        partials = x.new_empty(shards.count, *residual.shape)
        self.partials(x, shards, partials)
        return add_partials(partials, residual)

    def partials(self, x: Tensor, shards: InputShards, out: Tensor) -> None:
        """The sums of each shard by itself, as `add_to` adds them up. out: contiguous [shards, rows, out]."""
        for index, part in enumerate(shards.slices):
            out[index] = functional.linear(x[:, part].contiguous(), self.weight[:, part])


class PackedLinear(Linear):
    """`Linear` with its weight packed for this CPU's kernels. Raises ValueError as `PackedWeight.pack`."""

    def __init__(self, weight: Tensor | QuantizedTensor, bias: Tensor | None = None, activation: str = "none") -> None:
        self.packed = PackedWeight.pack(weight, gate=GATES.get(activation, "none"))
        self.bias = None if bias is None else bias.float()
        self.activation = "none" if activation in GATES else activation

    def __call__(self, x: Tensor) -> Tensor:
        return product(self.packed, x, bias=self.bias, activation=self.activation)

    def add_to(self, residual: Tensor, x: Tensor, shards: InputShards | None = None) -> Tensor:
        kept = {"bias": self.bias, "residual": residual}
        return product(self.packed, x, **kept, activation=self.activation, shards=shards)

    def partials(self, x: Tensor, shards: InputShards, out: Tensor) -> None:
        partial_products(self.packed, x, shards, out)


def add_partials(partials: Tensor, residual: Tensor | None = None) -> Tensor:
    """residual + the shards' sums, added in float32, in order, and rounded once. partials: [shards, rows, out]."""
    total = partials[0].float()
    for sums in partials[1:]:
        total = total + sums
    return (total if residual is None else total + residual).to(partials.dtype)


@cache
def _log_dequantized(dtype: str, device: str) -> None:
    """Once a process."""
    log.warning("there are no kernels for quantised weights on %s: they are computed with as %s", device, dtype)


def _dense(weight: Tensor | QuantizedTensor, dtype: torch.dtype) -> Tensor:
    return dequantize(weight, dtype) if isinstance(weight, QuantizedTensor) else weight.flatten(1)


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """Rows of all. For tensors without contents torch.cat would import torch's compiler: seconds, and 100 MB."""
    first = parts[0]
    if first.is_meta:
        return first.new_empty(sum(map(len, parts)), *first.shape[1:])
    return torch.cat(list(parts))


def _joined(weights: Sequence[Tensor | QuantizedTensor], dtype: torch.dtype) -> Tensor | QuantizedTensor:
    """One weight with the outputs of all. Where they differ in format or order of inputs, all are dequantised."""
    first = weights[0]
    if len(weights) == 1:
        return first if isinstance(first, QuantizedTensor) else first.flatten(1)
    quantized = [weight for weight in weights if isinstance(weight, QuantizedTensor)]
    if len(quantized) < len(weights) or not all(_alike(quantized[0], weight) for weight in quantized[1:]):
        return _stacked([_dense(weight, dtype) for weight in weights])
    zeros = [weight.zeros for weight in quantized if weight.zeros is not None]
    minimums = [weight.minimums for weight in quantized if weight.minimums is not None]
    return QuantizedTensor(
        quantized[0].quantization,
        _stacked([weight.values for weight in quantized]),
        _stacked([weight.scales for weight in quantized]),
        _stacked(zeros) if zeros else None,
        quantized[0].order,
        _stacked(minimums) if minimums else None,
    )


def _alike(one: QuantizedTensor, other: QuantizedTensor) -> bool:
    """Whether two matrices have one format, and inputs in one order."""
    if (one.quantization, one.zeros is None) != (other.quantization, other.zeros is None):
        return False
    if one.order is None or other.order is None:
        return one.order is other.order
    return torch.equal(one.order, other.order)
