"""Quantised weights are the nearest of their format, in the layout that chunks have."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mdi.core.quantization import (
    INT4,
    INT4_MINIMUMS,
    INT8,
    INT8_32_MINIMUMS,
    QUANTIZATIONS,
    Quantization,
    QuantizedTensor,
)
from mdi.layers import linear
from mdi.layers.quantize import NotFiniteError, ScaleError, dequantize, quantize

FORMATS = [*QUANTIZATIONS.values(), INT8_32_MINIMUMS, INT4_MINIMUMS]


def random_weight(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def groups(weight: Tensor, quantization: Quantization) -> Tensor:
    return weight.view(len(weight), -1, quantization.group or weight.shape[1])


@pytest.mark.parametrize("quantization", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_number_is_further_away_than_half_a_step(quantization: Quantization, dtype: torch.dtype) -> None:
    weight = random_weight(70, 96).to(dtype)
    made = quantize(weight, quantization)
    assert made.shape == weight.shape
    step = made.scales.float().abs()[..., None]
    off = (groups(dequantize(made), quantization) - groups(weight.float(), quantization)).abs()
    largest = groups(weight.float(), quantization).abs().amax(-1, keepdim=True)
    clamped = groups(weight.float(), quantization) / made.scales.float()[..., None] > 7.5  # only -8 reaches the largest
    assert (off <= 0.501 * step + 0.001 * largest)[~clamped].all()
    assert (off <= 1.01 * step).all()


def test_bytes_of_int8_are_signed_numbers_with_a_scale_for_each_output() -> None:
    made = quantize(torch.tensor([[1.0, -2.0, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0]]), INT8)
    assert made.values.dtype == torch.int8
    assert made.values.tolist() == [[64, -127, 32, 0], [0, 0, 0, 0]]
    assert made.scales.dtype == torch.float32
    assert made.scales.flatten().tolist() == pytest.approx([2 / 127, 0.0])


def test_bytes_of_int4_hold_an_even_input_in_their_low_half_and_a_scale_for_each_group() -> None:
    weight = torch.zeros(1, 64)
    weight[0, :4] = torch.tensor([4.0, -2.0, 0.5, -4.0])
    weight[0, 63] = -1.0
    made = quantize(weight, INT4)
    assert made.values.dtype == torch.uint8
    assert made.scales.dtype == torch.float16
    assert made.scales.tolist() == [[-0.5, 0.125]]  # the largest of a group is -8
    assert made.values[0, :2].tolist() == [0 | 12 << 4, 7 | 15 << 4]
    assert made.values[0, 31] == 8 | 0 << 4
    assert made.values[0, 2:31].tolist() == [8 | 8 << 4] * 29
    assert torch.equal(dequantize(made)[0, :2], torch.tensor([4.0, -2.0]))


def test_with_minimums_the_smallest_and_the_largest_of_a_group_have_the_smallest_and_the_largest_value() -> None:
    weight = torch.cat((torch.arange(1.0, 17.0).repeat(2), torch.full((32,), -0.75)))[None]
    nibbles, bytes_ = quantize(weight, INT4_MINIMUMS), quantize(weight, INT8_32_MINIMUMS)
    assert nibbles.values[0, :16].tolist() == [low | (low + 1) << 4 for low in range(0, 16, 2)] * 2
    assert bytes_.values[0, :32].tolist() == list(range(-128, 128, 17)) * 2
    for made in (nibbles, bytes_):
        assert made.minimums is not None
        assert made.minimums.dtype == made.scales.dtype
        assert torch.allclose(dequantize(made), weight, atol=1e-6)


def test_minimums_that_float16_cannot_describe_are_refused() -> None:
    with pytest.raises(ScaleError, match="minimums that float16"):
        quantize(random_weight(4, 64) - 1e5, INT4_MINIMUMS)


@pytest.mark.parametrize("quantization", FORMATS, ids=str)
def test_many_rows_are_what_one_row_is(quantization: Quantization) -> None:
    weight = random_weight(3000, 512)  # more than a block of them
    made = quantize(weight, quantization)
    for row in (0, 2047, 2048, 2999):
        assert torch.equal(dequantize(quantize(weight[row : row + 1], quantization))[0], dequantize(made)[row])
    assert torch.equal(dequantize(made, torch.bfloat16), dequantize(made).bfloat16())


@pytest.mark.parametrize("quantization", FORMATS, ids=str)
def test_a_kernel_s_further_dimensions_are_inputs(quantization: Quantization) -> None:
    kernel = random_weight(8, 2, 4, 8)
    assert torch.equal(quantize(kernel, quantization).values, quantize(kernel.flatten(1), quantization).values)


@pytest.mark.parametrize("quantization", FORMATS, ids=str)
@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_none_are_refused(quantization: Quantization, number: float) -> None:
    weight = random_weight(4, 64)
    weight[3, 63] = number
    with pytest.raises(NotFiniteError, match="infinite or none"):
        quantize(weight, quantization)


@pytest.mark.parametrize("factor", [1e8, 1e-8])
def test_scales_that_float16_cannot_describe_are_refused(factor: float) -> None:
    weight = random_weight(4, 64) * factor
    with pytest.raises(ScaleError, match="float16"):
        quantize(weight, INT4)
    assert torch.allclose(dequantize(quantize(weight, INT8)), weight, rtol=0.1, atol=0.02 * factor)


def test_one_group_of_tiny_numbers_among_others_is_none_for_float16_and_no_reason_to_refuse() -> None:
    weight = random_weight(4, 64)
    weight[2, 32:] *= 1e-10
    assert dequantize(quantize(weight, INT4))[2, 32:].abs().max() < 1e-6


def test_where_no_kernel_computes_with_them_they_are_dequantised_which_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(linear, "library", lambda: None)
    linear._log_dequantized.cache_clear()
    x = torch.randn(3, 64).bfloat16()
    for _ in range(2):
        product = linear.Linear.load(Quantized(), {"a": 24, "b": 8}, 64)
        exact = functional.linear(x.float(), random_weight(32, 64))
        assert (product(x).float() - exact).norm() < 0.01 * exact.norm()
    assert product.weight.dtype == torch.bfloat16
    assert [record.getMessage() for record in caplog.records] == [
        "there are no kernels for quantised weights on cpu: they are computed with as torch.bfloat16"
    ]


class Quantized:
    """A `GetTensor` of an int8 weight in two parts."""

    dtype = torch.bfloat16

    def __call__(self, name: str, shape: tuple[int, ...], dtype: str | None = None, /) -> Tensor:
        raise AssertionError

    def matrix(self, name: str, shape: tuple[int, ...], /) -> QuantizedTensor:
        rows = slice(0, 24) if name == "a.weight" else slice(24, 32)
        return quantize(random_weight(32, 64)[rows].view(shape), INT8)
