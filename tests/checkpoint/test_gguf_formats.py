"""Which format holds which of GGUF's types, and that it does so without rounding."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize as dequantized
from gguf.quants import quantize as quantized

from mdi.checkpoint.gguf_file import GgufTensor
from mdi.checkpoint.gguf_formats import EXACT, as_stored, has_one_format, nearest_format
from mdi.core.errors import CheckpointError
from mdi.core.quantization import FORMATS, INT4_MINIMUMS, INT8_32_MINIMUMS, Quantization
from mdi.layers.quantize import dequantize

KINDS = sorted({kind for held in EXACT.values() for kind in held})
SHAPE = (5, 96)


def stored(kind: str, weight: np.ndarray[tuple[int, int], np.dtype[np.float32]] | None = None) -> GgufTensor:
    numbers = np.random.default_rng(0).standard_normal(SHAPE, np.float32) if weight is None else weight
    rows = quantized(numbers, gguf.GGMLQuantizationType[kind])
    return GgufTensor("blk.0.ffn_up.weight", numbers.shape, kind, rows)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", EXACT)
def test_a_format_has_the_numbers_of_the_types_that_it_holds_and_no_others(name: str, kind: str) -> None:
    tensor = stored(kind)
    made = as_stored(tensor, FORMATS[name])
    if kind not in EXACT[name]:
        assert made is None
        return
    assert made is not None
    expected = dequantized(tensor.rows, gguf.GGMLQuantizationType[kind])
    assert torch.equal(dequantize(made), torch.from_numpy(expected))


@pytest.mark.parametrize(
    ("kinds", "name", "is_exact"),
    [
        ("Q4_0", "int4", True),
        ("Q4_1", "int4-minimums", True),
        ("Q4_0 Q4_1", "int4-minimums", True),  # llama.cpp's Q4_0 with an importance matrix
        ("Q4_0 Q5_0 Q8_0", "int8-32", True),
        ("Q5_1", "int8-32-minimums", True),
        ("Q4_1 Q8_0", "int8-32-minimums", True),
        ("Q5_0 Q5_1", "int8-32-minimums", True),
        ("Q4_1 Q6_K", "int8-32", False),
        ("Q6_K", "int8-32", False),
        ("Q4_1 F16", "int4-minimums", False),
        ("F16 F32", None, True),
    ],
)
def test_types_together_have_the_smallest_format_that_holds_them_all(
    kinds: str, name: str | None, is_exact: bool
) -> None:
    tensors = [GgufTensor("x", SHAPE, kind, np.zeros(0, np.uint8)) for kind in kinds.split()]
    assert (nearest_format(tensors), has_one_format(tensors)) == (name, is_exact)


@pytest.mark.parametrize(("kind", "format_"), [("Q4_1", INT4_MINIMUMS), ("Q5_1", INT8_32_MINIMUMS)])
def test_minimums_that_are_no_numbers_are_refused(kind: str, format_: Quantization) -> None:
    tensor = stored(kind)
    tensor.rows[2, 2:4] = np.array([np.inf], np.float16).view(np.uint8)
    with pytest.raises(CheckpointError, match=r"blk\.0\.ffn_up\.weight has minimums that are no float16 numbers"):
        as_stored(tensor, format_)


def test_a_zero_that_float16_cannot_describe_as_a_minimum_is_refused() -> None:
    tensor = stored("Q4_0", np.full((1, 32), 65535, np.float32))
    with pytest.raises(CheckpointError, match="minimums that are no float16 numbers"):
        as_stored(tensor, INT4_MINIMUMS)
