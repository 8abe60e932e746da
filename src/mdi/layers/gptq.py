"""int4 weights for the activations that a layer really has: GPTQ (arXiv:2210.17323), in groups that share a scale.

A product's error is seen through its inputs: with the Hessian H = sum of x x^T over calibration activations x, it is
e H e^T for an error e of a row of the weight. Columns are rounded one after the other, and what rounding one of them
costs is made good by the columns that are still to come. Differences to the paper: the scale of a group is chosen among
a few by that error, when its columns are reached; whole groups, and columns in them, come in the order of their weight
in H, and stay where they are; H is drawn towards its diagonal, because few activations say little about how inputs go
together (docs/decisions.md has what each brings).
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
ROWS_AT_ONCE = 1024  # of a weight: their groups stay in a processor's cache
BLOCK = 512  # inputs in a block of a triangular matrix


class Hessian:
    """The mean of x x^T over activations x: float32 [inputs, inputs]."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._rows = 0

    def add(self, x: Tensor) -> None:
        """x: [rows, inputs]."""
        x = x.float()
        if self._sum is None:
            self._sum = torch.zeros(x.shape[1], x.shape[1])
        for start in range(0, x.shape[1], BLOCK):  # the lower half: the other one is the same
            self._sum[start:, start : start + BLOCK].addmm_(x[:, start:].T, x[:, start : start + BLOCK])
        self._rows += len(x)

    @property
    def inputs(self) -> int:
        return 0 if self._sum is None else len(self._sum)

    def mean(self) -> Tensor:
        """Needs at least one row. The sum is given away: nothing can be added afterwards."""
        assert self._sum is not None
        made, self._sum = self._sum, None
        for start in range(0, len(made), BLOCK):
            made[start : start + BLOCK, start + BLOCK :] = made[start + BLOCK :, start : start + BLOCK].T
        return made.div_(self._rows)


@dataclass(frozen=True)
class Compensation:
    """How the error of one input is made good by others.

    quantization: a 4-bit format. order: of the inputs, whole groups together: int64 [inputs].
    factor: the upper Cholesky factor of the inverse of H with its inputs in this order. Row i of it, divided by its
    diagonal, is by how much the inputs after the i-th change where that one is rounded up by one.
    """

    quantization: Quantization
    order: Tensor
    factor: Tensor

    @classmethod
    def of(cls, hessian: Tensor, quantization: Quantization) -> Compensation:
        """hessian: [inputs, inputs], overwritten. The inputs are a multiple of the format's group."""
        group, weights = quantization.group, hessian.diagonal()
        assert group
        grouped = weights.view(-1, group)
        starts = grouped.sum(1).argsort(descending=True, stable=True) * group
        within = grouped.argsort(dim=1, descending=True, stable=True)
        order = (starts[:, None] + within[starts // group]).flatten()
        hessian.mul_(1 - SHRINKAGE).diagonal().mul_(1 / (1 - SHRINKAGE))
        hessian.diagonal().add_(float(weights.mean()) * DAMPING or 1.0)
        backwards = order.flip(0)  # H = R R^T with an upper R is factored from the other end; wanted is R^-1
        lower = torch.linalg.cholesky(hessian[backwards][:, backwards])
        return cls(quantization, order, _inverse(lower).flip(0, 1))


def _inverse(lower: Tensor) -> Tensor:
    """Of a lower triangular matrix, with a third of the operations that solving for the identity takes."""
    size = len(lower)
    made: Tensor
    if size <= BLOCK:
        made = torch.linalg.solve_triangular(lower, torch.eye(size), upper=False)
        return made
    half, made = size // 2, torch.zeros_like(lower)
    made[:half, :half] = _inverse(lower[:half, :half])
    made[half:, half:] = _inverse(lower[half:, half:])
    made[half:, :half] = made[half:, half:] @ lower[half:, :half] @ -made[:half, :half]
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
            values[rows, columns] = (numbers + 8).to(torch.uint8)
            scales[rows, columns[0] // group] = chosen.to(torch.float16)
    return QuantizedTensor(compensation.quantization, pack4(values), scales)


def _groups(weight: Tensor, compensation: Compensation, group: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The inputs of each group with their numbers [rows, group] and scale [rows], as they are rounded."""
    factor = compensation.factor
    left = weight[:, compensation.order]
    for start in range(0, left.shape[1], group):
        now, later = slice(start, start + group), slice(start + group, None)
        numbers, scales, errors = _round_group(left[:, now], factor[now, now])
        left[:, later].addmm_(errors, factor[now, later], alpha=-1)
        yield compensation.order[now], numbers, scales


def _round_group(part: Tensor, factor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rounds a group with each scale that is tried. Returns the best numbers, scales, and errors by the diagonal.

    part: [rows, group]; factor: [group, group].
    """
    scales = _tried_scales(part)
    divisors = torch.where(scales == 0, 1.0, scales)
    left = part.expand(len(scales), *part.shape).clone()
    numbers, errors = torch.empty_like(left), torch.empty_like(left)
    for column in range(left.shape[2]):
        exact = left[..., column]
        rounded = (exact / divisors).round_().clamp_(-8, 7)
        error = (exact - rounded * scales) / factor[column, column]
        left[..., column + 1 :] -= error[..., None] * factor[column, column + 1 :]
        numbers[..., column], errors[..., column] = rounded, error
    best = errors.square().sum(2).argmin(0)
    rows = torch.arange(len(part))
    return numbers[best, rows], scales[best, rows], errors[best, rows]


def _tried_scales(part: Tensor) -> Tensor:
    """As float16 has them: [tried, rows]."""
    largest = part.gather(1, part.abs().argmax(1, keepdim=True)).squeeze(1)
    tried = [largest / at * share for share in SHRUNKEN for at in LARGEST]
    return torch.stack(tried).to(torch.float16).float()
