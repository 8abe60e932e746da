"""int4 weights for the activations that a layer really has: GPTQ (arXiv:2210.17323), in groups that share a scale.

A product's error is seen through its inputs: with H = X^T X of calibration activations X, the error d of a row of the
weight costs d H d^T. Inputs are rounded one after the other, and what rounding has cost so far is made good by the next
one. H = R R^T with an upper triangular R says how: d H d^T is the sum of the squares of d R, and the j-th number of d R
is zero where input j differs by -sum_i<j d_i R_ij / R_jj (the form of arXiv:2307.13304, which needs no inverse of H).
Differences to the paper: the scale of a group is chosen among a few by that error, when its inputs are reached; whole
groups, and inputs in them, come in the order of their weight in H, and stay where they are; H is drawn towards its
diagonal, because few activations say little about how inputs go together (docs/decisions.md has what each brings).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mdi.core.quantization import Quantization, QuantizedTensor
from mdi.layers.quantize import NotFiniteError, check_float16, pack4

SHRINKAGE = 0.4  # how far H is drawn towards its diagonal
DAMPING = 0.02  # of the mean of H's diagonal, added to it: inputs that the calibration text never had
SHRUNKEN = (1.0, 0.92, 0.84)  # scales that are tried, as shares of the one that fits the largest weight of a group
LARGEST = (-8.0, 7.0)  # what the largest weight of a group is rounded to, with the largest scale
ROWS_AT_ONCE = 4096  # of a weight: their groups stay in a processor's cache
BLOCK = 512  # inputs whose part of H is computed at once


@dataclass(frozen=True)
class Compensation:
    """How the errors of inputs are made good by later ones.

    quantization: a 4-bit format. order: of the inputs, whole groups together: int64 [inputs].
    factor: R_ij / R_jj above the diagonal, for inputs in this order: [inputs, inputs].
    weights: R_jj, by how much what is left of input j's error counts: [inputs].
    """

    quantization: Quantization
    order: Tensor
    factor: Tensor
    weights: Tensor

    @classmethod
    def of(cls, x: Tensor, quantization: Quantization) -> Compensation:
        """x: activations, float32 [rows, inputs]. The inputs are a multiple of the format's group."""
        assert quantization.group
        weights = sum((rows.square().sum(0) for rows in torch.split(x, BLOCK)), torch.zeros(x.shape[1])).div_(len(x))
        order = _order(weights, quantization.group)
        backwards = order.flip(0)  # H = R R^T with an upper R is factored from the other end
        hessian = _lower_half(x.index_select(1, backwards)).mul_((1 - SHRINKAGE) / len(x))
        hessian.diagonal().copy_(weights[backwards] + (float(weights.mean()) * DAMPING or 1.0))
        factor = torch.linalg.cholesky(hessian).flip(0, 1)
        largest = factor.diagonal().clone()
        return cls(quantization, order, factor.div_(largest), largest)


def _order(weights: Tensor, group: int) -> Tensor:
    """Of the inputs: groups by their weight, and by weight in each."""
    grouped = weights.view(-1, group)
    starts = grouped.sum(1).argsort(descending=True, stable=True) * group
    within = grouped.argsort(dim=1, descending=True, stable=True)
    return (starts[:, None] + within[starts // group]).flatten()


def _lower_half(x: Tensor) -> Tensor:
    """Of x^T x: [inputs, inputs], with zeros above."""
    made = x.new_zeros(x.shape[1], x.shape[1])
    for rows in torch.split(x, BLOCK):
        for start in range(0, len(made), BLOCK):
            made[start:, start : start + BLOCK].addmm_(rows[:, start:].T, rows[:, start : start + BLOCK])
    return made


def quantize_with(weight: Tensor, compensation: Compensation) -> QuantizedTensor:
    """A weight whose product errs little on the activations behind `compensation`.

    weight: [outputs, inputs]. Raises NotFiniteError and ScaleError, as `quantize`.
    """
    group, (outputs, inputs) = compensation.quantization.group, weight.shape
    assert group
    values = torch.empty(outputs, inputs, dtype=torch.uint8)
    scales = torch.empty(outputs, inputs // group, dtype=torch.float16)
    if not weight.isfinite().all():
        raise NotFiniteError("it has numbers that are infinite or none")
    check_float16(float(weight.abs().max()) / 8)
    for start in range(0, outputs, ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        for columns, numbers, chosen in _groups(weight[rows].float(), compensation, group):
            values[rows, columns] = (numbers + 8).to(torch.uint8).T
            scales[rows, columns[0] // group] = chosen.to(torch.float16)
    return QuantizedTensor(compensation.quantization, pack4(values), scales)


def _groups(weight: Tensor, compensation: Compensation, group: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The inputs of each group with their numbers [group, rows] and scale [rows], as they are rounded."""
    order, factor, weights = compensation.order, compensation.factor, compensation.weights
    exact = weight.T[order]
    errors = torch.empty_like(exact)  # what was rounded away
    for start in range(0, len(exact), group):
        now = slice(start, start + group)
        made_good = factor[:start, now].T @ errors[:start]
        numbers, scales = _rounded_group(exact[now], made_good, factor[now, now], weights[now].tolist())
        torch.addcmul(exact[now], numbers, scales, value=-1, out=errors[now])
        yield order[now], numbers, scales


def _rounded_group(part: Tensor, made_good: Tensor, factor: Tensor, weights: list[float]) -> tuple[Tensor, Tensor]:
    """Rounds a group with each scale that is tried. Returns the best: numbers [group, rows], scales [rows].

    part: [group, rows]; made_good: what the errors of earlier groups add to it.
    """
    group, rows = part.shape
    wanted = part + made_good
    scales = _tried_scales(wanted)
    inverse = torch.where(scales == 0, 1.0, scales).reciprocal_()
    numbers, errors = part.new_empty(2, group, *scales.shape)
    lost = torch.zeros_like(scales)
    for index, weight in enumerate(weights):
        exact = (factor[:index, index] @ errors[:index].flatten(1)).view_as(scales).add_(wanted[index])
        rounded = torch.mul(exact, inverse, out=numbers[index]).round_().clamp_(-8, 7) * scales
        torch.sub(part[index], rounded, out=errors[index])
        exact -= rounded
        lost.addcmul_(exact, exact, value=weight**2)
    best = lost.argmin(0, keepdim=True)
    return numbers.gather(1, best.expand(group, 1, rows)).squeeze(1), scales.gather(0, best).squeeze(0)


def _tried_scales(wanted: Tensor) -> Tensor:
    """As float16 has them: [tried, rows]."""
    largest = wanted.gather(0, wanted.abs().argmax(0, keepdim=True)).squeeze(0)
    tried = [largest / at * share for share in SHRUNKEN for at in LARGEST]
    return torch.stack(tried).to(torch.float16).float()
