"""Quantised weights from floating ones, rounded to nearest, and back."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mdi.core.quantization import Quantization, QuantizedTensor

ELEMENTS_AT_ONCE = 2**18  # their float32 copies stay in a processor's cache
SMALLEST_SCALE, LARGEST_SCALE = torch.finfo(torch.float16).smallest_normal, torch.finfo(torch.float16).max


class NotFiniteError(ValueError):
    """A weight has numbers that are infinite or none."""


class ScaleError(ValueError):
    """A weight is so small or so large that its scales do not fit float16."""


def quantize(weight: Tensor, quantization: Quantization) -> QuantizedTensor:
    """The nearest weight of this format. weight: [outputs, *inputs], whose inputs are a multiple of the group.

    8 bits: the largest number of an output is 127 or -127. 4 bits: the largest of a group is -8 (the rule of Q4_0 in
    llama.cpp, ggml/src/ggml-quants.c), so that its sign is that of the scale's negative. Formats with minimums: the
    smallest and the largest of a group have the smallest and the largest value (Q4_1 there).
    Raises NotFiniteError, and ScaleError where float16 scales cannot describe the weight as a whole.
    """
    weight = weight.flatten(1)
    outputs, inputs = weight.shape
    made, largest = _empty(quantization, outputs, inputs), 0.0
    for rows in _blocks(outputs, inputs):
        groups = weight[rows].float().view(-1, made.scales.shape[1], quantization.group or inputs)
        exact = _scales(groups, quantization)
        largest = max(largest, float(exact.abs().max()))
        if not exact.isfinite().all():  # so is one number at least: minima and maxima pass NaN on
            raise NotFiniteError("it has numbers that are infinite or none")
        made.scales[rows] = exact[..., 0]
        scales = made.scales[rows].float()[..., None]
        if made.minimums is not None:
            made.minimums[rows] = _minimums(groups, scales, quantization)[..., 0]
            groups = groups - made.minimums[rows].float()[..., None]
        scaled = groups / torch.where(scales == 0, 1.0, scales)  # a scale of 0 is that of equal numbers, or zeros
        zero = 8 if made.minimums is None else 0
        made.values[rows] = scaled.round_().flatten(1) if quantization.bits == 8 else _packed(scaled, zero)
    if made.minimums is not None and not made.minimums.isfinite().all():
        raise ScaleError("it has minimums that float16 cannot describe")
    if quantization.bits == 4:
        check_float16(largest)
    return made


def check_float16(largest: float) -> None:
    """Raises ScaleError where float16 does not have the largest scale of a weight."""
    if largest > 0 and not SMALLEST_SCALE <= largest <= LARGEST_SCALE:
        raise ScaleError(f"its largest scale would be {largest:.2g}, which float16 cannot describe")


def pack4(numbers: Tensor) -> Tensor:
    """Bytes of two numbers: uint8 of 0 to 15 [outputs, inputs] -> uint8 [outputs, inputs / 2]."""
    pairs = numbers.view(torch.int16)  # first + 256 * second
    return (pairs | pairs >> 4).to(torch.uint8)


def dequantize(weight: QuantizedTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """[outputs, inputs] in a floating dtype, inputs in the order that they come in."""
    outputs, inputs = weight.shape
    made = torch.empty(outputs, inputs, dtype=dtype, device=weight.values.device)
    places = None if weight.order is None else weight.order.long().argsort()
    for rows in _blocks(outputs, inputs):
        numbers = _floating(weight, rows)
        made[rows] = numbers if places is None else numbers[:, places]
    return made


def _floating(weight: QuantizedTensor, rows: slice) -> Tensor:
    values, scales = weight.values[rows], weight.scales[rows].float()[..., None]
    if weight.quantization.bits == 4:
        values = torch.stack((values & 15, values >> 4), dim=-1)
    numbers = values.view(*scales.shape[:2], -1).float()
    if weight.minimums is not None:
        return (numbers * scales + weight.minimums[rows].float()[..., None]).flatten(1)
    if weight.zeros is not None:
        numbers -= weight.zeros[rows].float()[..., None]
    elif weight.quantization.bits == 4:
        numbers -= 8
    return (numbers * scales).flatten(1)


def _empty(quantization: Quantization, outputs: int, inputs: int) -> QuantizedTensor:
    n_groups = inputs // (quantization.group or inputs)
    if quantization.bits == 8:
        values, dtype = torch.empty(outputs, inputs, dtype=torch.int8), torch.float32
    else:
        values, dtype = torch.empty(outputs, inputs // 2, dtype=torch.uint8), torch.float16
    scales = torch.empty(outputs, n_groups, dtype=dtype)
    return QuantizedTensor(quantization, values, scales, minimums=scales.clone() if quantization.minimums else None)


def _scales(groups: Tensor, quantization: Quantization) -> Tensor:
    """[outputs, groups, 1]"""
    high, low = groups.amax(2, keepdim=True), groups.amin(2, keepdim=True)
    if quantization.minimums:
        return (high - low) / (15 if quantization.bits == 4 else 255)
    if quantization.bits == 8:
        return torch.maximum(high, -low) / 127
    return torch.where(high >= -low, high, low) / -8


def _minimums(groups: Tensor, scales: Tensor, quantization: Quantization) -> Tensor:
    """What the value 0 stands for: [outputs, groups, 1]. The smallest number's value is 0 in 4 bits, -128 in 8."""
    low = groups.amin(2, keepdim=True)
    return low if quantization.bits == 4 else low + 128 * scales


def _packed(scaled: Tensor, zero: int) -> Tensor:
    """Numbers of -zero on [outputs, groups, group] -> bytes of two that are 0 to 15 [outputs, inputs / 2]."""
    return pack4((scaled + (zero + 0.5)).clamp_(0, 15).to(torch.uint8).flatten(1))


def _blocks(outputs: int, inputs: int) -> Iterator[slice]:
    step = max(1, ELEMENTS_AT_ONCE // inputs)
    return (slice(start, min(start + step, outputs)) for start in range(0, outputs, step))
