"""Rounding for the activations of a calibration loses less of a product than rounding to the nearest."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mdi.core.quantization import INT4
from mdi.layers.gptq import DAMPING, SHRINKAGE, Compensation, quantize_with
from mdi.layers.quantize import NotFiniteError, ScaleError, dequantize, quantize

INPUTS, OUTPUTS = 128, 96


def random_tensor(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def activations(rows: int, seed: int) -> Tensor:
    """Inputs that go together, some of them 30 times as large as others: what models have."""
    mixing = random_tensor(24, INPUTS, seed=100)
    sizes = random_tensor(INPUTS, seed=101).exp()
    return (random_tensor(rows, 24, seed=seed) @ mixing + 0.5 * random_tensor(rows, INPUTS, seed=seed + 1)) * sizes


def lost(weight: Tensor, rounded: Tensor, x: Tensor) -> float:
    return float((x @ (rounded - weight).T).square().mean())


def test_the_product_errs_less_on_activations_that_were_not_in_the_calibration() -> None:
    weight, held_out = random_tensor(OUTPUTS, INPUTS, seed=0), activations(500, seed=2)
    calibrated = dequantize(quantize_with(weight, Compensation.of(activations(2000, seed=4), INT4)))
    assert lost(weight, calibrated, held_out) < 0.5 * lost(weight, dequantize(quantize(weight, INT4)), held_out)


def test_few_activations_do_not_make_it_worse_than_the_nearest() -> None:
    weight, held_out = random_tensor(OUTPUTS, INPUTS, seed=0), activations(500, seed=2)
    calibrated = dequantize(quantize_with(weight, Compensation.of(activations(INPUTS // 2, seed=4), INT4)))
    assert lost(weight, calibrated, held_out) < lost(weight, dequantize(quantize(weight, INT4)), held_out)


def test_the_factor_is_that_of_the_activations_drawn_towards_their_diagonal() -> None:
    x = activations(700, seed=0)  # more than are summed at once
    hessian = (x.double().T @ x.double()) / len(x)
    drawn = hessian * (1 - SHRINKAGE)
    drawn.diagonal().copy_(hessian.diagonal() + DAMPING * hessian.diagonal().mean())
    made = Compensation.of(x, INT4)
    factor = made.factor.double() * made.weights.double()
    assert torch.equal(factor, factor.triu())
    expected = drawn[made.order][:, made.order]
    assert torch.allclose(factor @ factor.T, expected, rtol=1e-4, atol=1e-4 * float(expected.max()))


def test_groups_stay_whole_and_come_by_their_weight() -> None:
    order = Compensation.of(activations(300, seed=0), INT4).order.view(-1, 32)
    assert torch.equal(order.flatten().sort().values, torch.arange(INPUTS))
    assert all(len(set((group // 32).tolist())) == 1 for group in order)


def test_where_inputs_do_not_go_together_each_weight_errs_no_more_than_the_nearest() -> None:
    weight = random_tensor(OUTPUTS, INPUTS, seed=0)
    calibrated = dequantize(quantize_with(weight, Compensation.of(torch.eye(INPUTS), INT4)))
    assert (calibrated - weight).square().mean() < (dequantize(quantize(weight, INT4)) - weight).square().mean()


def test_inputs_and_outputs_that_are_always_zero_are_no_exception() -> None:
    weight, x = random_tensor(OUTPUTS, INPUTS, seed=0), activations(300, seed=0)
    weight[:, :32], weight[3], x[:, 64:70] = 0, 0, 0
    made = dequantize(quantize_with(weight, Compensation.of(x, INT4)))
    assert made.isfinite().all()
    assert not made[3].any()
    assert dequantize(quantize_with(weight, Compensation.of(torch.zeros(INPUTS, INPUTS), INT4))).isfinite().all()


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused(number: float) -> None:
    weight = random_tensor(OUTPUTS, INPUTS, seed=0)
    weight[5, 7] = number
    with pytest.raises(NotFiniteError):
        quantize_with(weight, Compensation.of(torch.eye(INPUTS), INT4))


@pytest.mark.parametrize("size", [1e-9, 1e9])
def test_weights_whose_scales_float16_does_not_have_are_refused(size: float) -> None:
    with pytest.raises(ScaleError):
        quantize_with(random_tensor(OUTPUTS, INPUTS, seed=0) * size, Compensation.of(torch.eye(INPUTS), INT4))
