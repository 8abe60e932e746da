"""Quantised weights from floating ones, rounded to nearest, and back."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mdi.core.quantization import Quantization, QuantizedTensor

ELEMENTS_AT_ONCE = 2**20  # their float32 copies stay in a processor's cache
SMALLEST_SCALE = torch.finfo(torch.float16).smallest_normal


class NotFiniteError(ValueError):
    """A weight has numbers that are infinite or none."""


class ScaleError(ValueError):
    """A weight is so small or so large that its scales do not fit float16."""


def quantize(weight: Tensor, quantization: Quantization) -> QuantizedTensor:
    """The nearest weight of this format. weight: [outputs, *inputs], whose inputs are a multiple of the group.

    8 bits: the largest number of an output is 127 or -127. 4 bits: the largest of a group is -8 (the rule of Q4_0 in
    llama.cpp, ggml/src/ggml-quants.c), so that its sign is that of the scale's negative.
    Raises NotFiniteError, and ScaleError where float16 scales cannot describe the weight as a whole.
    """
    weight = weight.flatten(1)
    outputs, inputs = weight.shape
    if quantization.bits == 8:
        values = torch.empty(outputs, inputs, dtype=torch.int8)
        scales = torch.empty(outputs, 1, dtype=torch.float32)
    else:
        assert quantization.group
        values = torch.empty(outputs, inputs // 2, dtype=torch.uint8)
        scales = torch.empty(outputs, inputs // quantization.group, dtype=torch.float16)
    largest = torch.zeros(())
    for rows in _blocks(outputs, inputs):
        part = weight[rows].float()
        if not part.isfinite().all():
            raise NotFiniteError("it has numbers that are infinite or none")
        exact = part.abs().amax(1, keepdim=True) / 127 if quantization.bits == 8 else _scales4(part, quantization)
        scales[rows] = exact
        values[rows] = _rounded8(part, exact) if quantization.bits == 8 else _rounded4(part, scales[rows].float())
        largest = torch.maximum(largest, exact.abs().max())
    if quantization.bits == 4 and largest > 0 and not SMALLEST_SCALE <= largest <= torch.finfo(torch.float16).max:
        raise ScaleError(f"its largest scale would be {largest:.2g}, which float16 cannot describe")
    return QuantizedTensor(quantization, values, scales)


def dequantize(weight: QuantizedTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """[outputs, inputs] in a floating dtype."""
    outputs, inputs = weight.shape
    made = torch.empty(outputs, inputs, dtype=dtype, device=weight.values.device)
    for rows in _blocks(outputs, inputs):
        made[rows] = _floating(weight, rows)
    return made


def _floating(weight: QuantizedTensor, rows: slice) -> Tensor:
    values, scales = weight.values[rows], weight.scales[rows].float()
    if weight.quantization.bits == 8:
        return values.float() * scales
    numbers = torch.stack((values & 15, values >> 4), dim=-1).view(len(values), scales.shape[1], -1).float()
    zeros = 8 if weight.zeros is None else weight.zeros[rows].float()[..., None]
    return ((numbers - zeros) * scales[..., None]).flatten(1)


def _scales4(part: Tensor, quantization: Quantization) -> Tensor:
    assert quantization.group
    grouped = part.view(len(part), -1, quantization.group)
    return grouped.gather(2, grouped.abs().argmax(2, keepdim=True)).squeeze(2) / -8


def _rounded8(part: Tensor, scales: Tensor) -> Tensor:
    return (part / _nonzero(scales)).round_().to(torch.int8)


def _rounded4(part: Tensor, scales: Tensor) -> Tensor:
    grouped = part.view(*scales.shape, -1) / _nonzero(scales)[..., None]
    numbers = (grouped.round_().clamp_(-8, 7) + 8).to(torch.uint8).flatten(1)
    return numbers[:, 0::2] | numbers[:, 1::2] << 4


def _nonzero(scales: Tensor) -> Tensor:
    """Scales to divide by: those of zeros are zeros."""
    return torch.where(scales == 0, 1.0, scales)


def _blocks(outputs: int, inputs: int) -> Iterator[slice]:
    step = max(1, ELEMENTS_AT_ONCE // inputs)
    return (slice(start, min(start + step, outputs)) for start in range(0, outputs, step))
