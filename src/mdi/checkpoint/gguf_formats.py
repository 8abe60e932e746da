"""The quantised types of GGUF files in our formats: those whose integers and scales are taken as they are.

Layouts: `block_q4_0`, `block_q5_0`, `block_q8_0` in llama.cpp, ggml/src/ggml-common.h. All have a float16 scale for 32
inputs, and whole numbers around zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mdi.checkpoint.gguf_file import GgufTensor
from mdi.core.quantization import INT4, INT8_32, Quantization, QuantizedTensor
from mdi.layers.quantize import pack4

GROUP = 32
FLOATS = ("F32", "F16", "BF16", "F64")
EXACT = {INT4.name: ("Q4_0",), INT8_32.name: ("Q8_0", "Q5_0", "Q4_0")}
"""The types that each format holds without rounding."""


def nearest_format(tensors: Sequence[GgufTensor]) -> str | None:
    """The smallest format that holds what these matrices are stored as: None where they are floating-point numbers.

    Q4_0 is int4. Other types become int8 in groups of 32: with their own integers, or rounded to the nearest.
    """
    kinds = {tensor.kind for tensor in tensors}.difference(FLOATS)
    if not kinds:
        return None
    return INT4.name if kinds.issubset(EXACT[INT4.name]) else INT8_32.name


def has_one_format(tensors: Sequence[GgufTensor]) -> bool:
    """Whether none of these matrices is rounded to their nearest format."""
    held = EXACT.get(nearest_format(tensors) or "", FLOATS)
    return all(tensor.kind in held for tensor in tensors)


def as_stored(tensor: GgufTensor, quantization: Quantization) -> QuantizedTensor | None:
    """A matrix with its own integers and scales; None where the format would have to round it."""
    if tensor.kind not in EXACT.get(quantization.name, ()):
        return None
    outputs, inputs = tensor.shape
    blocks = torch.from_numpy(np.array(tensor.rows)).view(outputs, inputs // GROUP, -1)
    scales = blocks[..., :2].contiguous().view(torch.float16)[..., 0]
    numbers = _numbers(blocks[..., 2:], tensor.kind).reshape(outputs, inputs)
    if quantization == INT4:
        return QuantizedTensor(INT4, pack4(numbers.contiguous()), scales.contiguous())
    zero = {"Q8_0": 0, "Q5_0": 16, "Q4_0": 8}[tensor.kind]
    return QuantizedTensor(INT8_32, (numbers.to(torch.int16) - zero).to(torch.int8), scales.float())


def _numbers(bytes_: Tensor, kind: str) -> Tensor:
    """The whole numbers of blocks, as they are stored: [outputs, groups, 32]."""
    if kind == "Q8_0":
        return bytes_.view(torch.int8)
    nibbles = bytes_[..., -GROUP // 2 :]  # number i in the low half of byte i, number 16 + i in its high half
    numbers = torch.cat((nibbles & 15, nibbles >> 4), -1)
    if kind == "Q4_0":
        return numbers
    bits = bytes_[..., :4].repeat_interleave(8, -1) >> (torch.arange(GROUP, dtype=torch.uint8) % 8)
    return numbers | (bits & 1) << 4
