"""The quantised types of GGUF files in our formats: those whose integers and scales are taken as they are.

Layouts: `block_q4_0`, `block_q4_1`, `block_q5_0`, `block_q5_1`, `block_q8_0` in llama.cpp, ggml/src/ggml-common.h. All
have a float16 scale for 32 inputs; then whole numbers around zero, or a float16 minimum and whole numbers from zero on.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mdi.checkpoint.gguf_file import GgufTensor
from mdi.core.errors import CheckpointError
from mdi.core.quantization import INT4, INT4_MINIMUMS, INT8_32, INT8_32_MINIMUMS, Quantization, QuantizedTensor
from mdi.layers.quantize import pack4

GROUP = 32
FLOATS = ("F32", "F16", "BF16", "F64")
ZEROS = {"Q4_0": 8, "Q5_0": 16, "Q8_0": 0}
WITH_MINIMUMS = ("Q4_1", "Q5_1")
EXACT = {
    INT4.name: ("Q4_0",),
    INT4_MINIMUMS.name: ("Q4_0", "Q4_1"),
    INT8_32.name: ("Q4_0", "Q5_0", "Q8_0"),
    INT8_32_MINIMUMS.name: ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
}
"""The types that each format holds without rounding, from the smallest format on."""


def nearest_format(tensors: Sequence[GgufTensor]) -> str | None:
    """The smallest format that holds what these matrices are stored as: None where they are floating-point numbers.

    Where none does, it is int8 in groups of 32: other types are rounded to it.
    """
    kinds = {tensor.kind for tensor in tensors}.difference(FLOATS)
    if not kinds:
        return None
    return next((name for name, held in EXACT.items() if kinds.issubset(held)), INT8_32.name)


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
    scales, rest = _float16(blocks)
    minimums, rest = _float16(rest) if tensor.kind in WITH_MINIMUMS else (None, rest)
    numbers = _numbers(rest, tensor.kind).reshape(outputs, inputs)
    zero = ZEROS.get(tensor.kind, 0)
    if quantization.bits == 4:
        values = pack4(numbers.contiguous())
    else:
        values, scales = (numbers.to(torch.int16) - zero).to(torch.int8), scales.float()
    if not quantization.minimums:
        return QuantizedTensor(quantization, values, scales)
    if minimums is None:
        minimums = scales * -zero if quantization.bits == 4 else torch.zeros_like(scales)
    if not minimums.isfinite().all():
        raise CheckpointError(
            f"the tensor {tensor.name} has minimums that are no float16 numbers: download or convert the model again"
        )
    return QuantizedTensor(quantization, values, scales, minimums=minimums.to(scales.dtype))


def _float16(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The number that each block begins with, [outputs, groups], and what follows it."""
    return blocks[..., :2].contiguous().view(torch.float16)[..., 0].contiguous(), blocks[..., 2:]


def _numbers(bytes_: Tensor, kind: str) -> Tensor:
    """The whole numbers of blocks, as they are stored: [outputs, groups, 32]."""
    if kind == "Q8_0":
        return bytes_.view(torch.int8)
    nibbles = bytes_[..., -GROUP // 2 :]  # number i in the low half of byte i, number 16 + i in its high half
    numbers = torch.cat((nibbles & 15, nibbles >> 4), -1)
    if kind in ("Q4_0", "Q4_1"):
        return numbers
    bits = bytes_[..., :4].repeat_interleave(8, -1) >> (torch.arange(GROUP, dtype=torch.uint8) % 8)
    return numbers | (bits & 1) << 4
