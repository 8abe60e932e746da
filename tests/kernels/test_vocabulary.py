"""Drawing's view of a row of logits, against torch: odd sizes, equals, forbidden tokens, extreme numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mdi.kernels import vocabulary
from mdi.layers.peaks import peaks

SIZES = (1, 2, 7, 63, 64, 65, 1024, 1031, 5000, 151936)


def logits_of(size: int, seed: int = 0) -> Tensor:
    """Logits with equals among them."""
    return (torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 40).round() / 8


def stable_highest(logits: Tensor, count: int) -> list[int]:
    order = logits.sort(descending=True, stable=True).indices[:count]
    return sorted(order[logits[order] > -math.inf].tolist())


@pytest.mark.parametrize("size", SIZES)
def test_peaks_are_the_likeliest_token_and_the_sum_of_all(size: int) -> None:
    rows = torch.stack([logits_of(size, seed) for seed in range(5)])
    temperatures = [1.0, 0.05, 1e-5, 3.0, 100.0]
    for row, temperature, (token, total) in zip(rows, temperatures, peaks(rows, temperatures), strict=True):
        assert token == int((row == row.max()).nonzero()[0])
        expected = ((row.double() - row.max()) / temperature).exp().sum()
        assert total == pytest.approx(float(expected), rel=1e-5)


def test_a_row_has_the_same_bits_alone() -> None:
    rows = torch.randn(7, 5003)
    together = peaks(rows, [0.7] * 7)
    assert together == [peaks(row[None], [0.7])[0] for row in rows]


def test_peaks_of_extreme_logits() -> None:
    largest = torch.finfo(torch.float32).max
    rows = torch.full((3, 100), -math.inf)
    rows[0, 70] = -largest
    rows[1, [3, 4]] = largest
    rows[2, :] = torch.tensor([largest, -largest] * 50)
    assert peaks(rows, [1e300, 1e-5, 1.0]) == [(70, 1.0), (3, 2.0), (0, 50.0)]


@pytest.mark.parametrize("size", SIZES)
def test_the_highest_are_those_of_a_stable_sort(size: int) -> None:
    for seed, count in enumerate({1, 2, min(20, size), min(1024, size), size} - {0}):
        if count <= size:
            logits = logits_of(size, seed)
            assert vocabulary.highest(logits, count).tolist() == stable_highest(logits, count)


@pytest.mark.parametrize("allowed", [0, 1, 5, 64, 2999])
@pytest.mark.parametrize("count", [1, 40, 3000])
def test_forbidden_tokens_are_never_among_the_highest(allowed: int, count: int) -> None:
    logits = logits_of(3000)
    logits[torch.randperm(3000, generator=torch.Generator().manual_seed(1))[allowed:]] = -math.inf
    assert vocabulary.highest(logits, count).tolist() == stable_highest(logits, count)


def test_zeros_of_both_signs_are_equal() -> None:
    logits = torch.tensor([-0.0, 0.0, -1.0, -0.0, 0.0])
    assert vocabulary.highest(logits, 3).tolist() == [0, 1, 3]


def test_a_view_with_strides_is_read_as_it_is_seen() -> None:
    wide = torch.randn(3000, 2)
    view = wide[:, 1]
    assert vocabulary.highest(view, 9).tolist() == stable_highest(view, 9)
    assert peaks(wide.T, [1.0, 1.0])[1][0] == int(view.argmax())
