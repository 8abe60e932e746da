"""Tokens drawn from candidates of parts of the vocabulary are those drawn from all logits, with the same bits."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from mdi.core.batch import LogitAdjustment, TokenSampling
from mdi.kernels import vocabulary
from mdi.layers.candidates import MAX_CANDIDATES, Candidates, n_candidates
from mdi.layers.sampler import sample

SIZE = 9 * 1024 + 77
BOUNDS = (0, 2048, 3072, 9 * 1024, SIZE)  # the last part has fewer tokens than there may be candidates
GREEDY = TokenSampling(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=7, sample=0, position=0)
DRAWN = replace(GREEDY, temperature=1.3, top_k=20)
ADJUSTMENT = LogitAdjustment(1.0, 0.0, 0.0, b"", b"", b"", (5,), (0.5,))


@pytest.fixture(params=["kernels", "torch"], autouse=True)
def _path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch":
        monkeypatch.setattr(vocabulary, "library", lambda: None)


def merged(logits: Tensor, count: int) -> Candidates:
    parts = []
    for first, end in pairwise(BOUNDS):
        part = logits[:, first:end]
        parts.append(Candidates.of(part, first, count, part.isfinite().all(1)).packed)
    return Candidates.merged(parts, count)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "sampling",
    [
        GREEDY,
        replace(GREEDY, top_logprobs=20),
        replace(GREEDY, temperature=1e-6),
        DRAWN,
        replace(DRAWN, top_logprobs=20, top_k=3),
        replace(DRAWN, top_p=0.8),
        replace(DRAWN, min_p=0.1, temperature=0.4),
        replace(DRAWN, top_k=MAX_CANDIDATES, temperature=30.0),
    ],
)
def test_tokens_and_logprobs_have_the_bits_of_all_logits(sampling: TokenSampling, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(40, SIZE, generator=generator) * 4).to(dtype)
    logits[10:] = logits[10:].round()  # many equals, also the highest ones
    samplings = [replace(sampling, position=position) for position in range(len(logits))]
    assert merged(logits, n_candidates(samplings)).sample(samplings) == sample(logits, samplings)


def test_of_equals_the_first_is_taken_in_whatever_part_it_is() -> None:
    for first in (0, 2047, 2048, 3072, SIZE - 2):
        logits = torch.zeros(1, SIZE)
        logits[0, [first, SIZE - 1]] = 3.0
        [token] = merged(logits, 2).sample([replace(GREEDY, top_logprobs=2)])
        assert (token.id, [one for one, _ in token.top_logprobs]) == (first, [first, SIZE - 1])


def test_rows_that_any_part_found_infinite_are_known() -> None:
    logits = torch.zeros(3, SIZE)
    logits[1, 5000] = torch.inf
    assert merged(logits, 1).finite[:, 0].tolist() == [1, 0, 1]


def test_who_needs_all_logits() -> None:
    assert n_candidates([GREEDY]) == 1
    assert n_candidates([GREEDY, DRAWN, replace(GREEDY, top_logprobs=5)]) == 20
    assert n_candidates([replace(DRAWN, top_k=2, top_logprobs=5)]) == 5
    for needing in (
        replace(DRAWN, top_k=0),
        replace(DRAWN, top_k=MAX_CANDIDATES + 1),
        replace(GREEDY, adjustment=ADJUSTMENT),
        replace(DRAWN, token_mask=b"\1"),
    ):
        assert n_candidates([GREEDY, needing]) == 0
