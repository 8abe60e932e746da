"""Numbers at the edge: settings of the sampler that overflow or vanish, and models whose numbers overflow."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mdi.core.batch import LogitAdjustment, TokenSampling, token_bits
from mdi.core.sampling import SamplingParams
from mdi.layers import sampler
from mdi.layers.sampler import sample

PLAIN = TokenSampling(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=1, sample=0, position=0)
LEAST = 5e-324  # of what JSON can carry
TEMPERATURES = [LEAST, 1e-310, 1e-40, 1e-38, 1e-9, 1e-5, 1e-4, 0.01, 0.7, 1.0, 3.0, 100.0, 1e30, 1e300]
SHARES = st.sampled_from([0.0, LEAST, 1e-40, 1e-9, 0.5, 1 - 1e-9, 1.0]) | st.floats(0, 1)


def logits_of(vocab_size: int, seed: int, scale: float = 3.0) -> Tensor:
    return torch.randn(vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


def adjustment(penalty: float = 1.0, **changes: Any) -> LogitAdjustment:
    return LogitAdjustment(
        penalty,
        changes.get("presence", 0.0),
        changes.get("frequency", 0.0),
        bytes(token_bits(changes.get("counts", {}))),
        np.array(list(changes.get("counts", {})), "<u4").tobytes(),
        np.array(list(changes.get("counts", {}).values()), "<u4").tobytes(),
        tuple(changes.get("biases", {})),
        tuple(changes.get("biases", {}).values()),
    )


def scores_in_transformers(logits: Tensor, sampling: TokenSampling) -> Tensor:
    """The logits that transformers draws from, in float64: [vocab_size]."""
    made, seen = LogitsProcessorList(), torch.empty((1, 0), dtype=torch.int64)
    if sampling.adjustment:
        made.append(RepetitionPenaltyLogitsProcessor(sampling.adjustment.repetition_penalty))
        counted = np.frombuffer(sampling.adjustment.counted_ids, "<u4")
        seen = torch.from_numpy(counted.astype(np.int64))[None]
    made.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        made.append(TopKLogitsWarper(sampling.top_k))
    made.append(TopPLogitsWarper(sampling.top_p))
    made.append(MinPLogitsWarper(sampling.min_p))
    scores: Tensor = made(seen, logits.double()[None])
    return scores[0]


def share_of(scores: Tensor, token_id: int) -> tuple[float, float]:
    """The part of [0, 1] that stands for a token when the likeliest come first."""
    ordered, ids = scores.sort(descending=True)
    ends = ordered.softmax(0).cumsum(0)
    rank = int((ids == token_id).nonzero())
    return float(ends[rank - 1]) if rank else 0.0, float(ends[rank])


@given(
    vocab_size=st.sampled_from([1, 2, 40, 3000]),
    seed=st.integers(0, 2**32),
    temperature=st.sampled_from([t for t in TEMPERATURES if t >= sampler.GREEDY_TEMPERATURE]) | st.floats(1e-5, 100),
    top_k=st.sampled_from([0, 1, 2, 50, 2000, 10**6]),
    top_p=SHARES,
    min_p=SHARES,
    penalty=st.sampled_from([None, 1e-3, 0.5, 1.7, 100.0]),
    number=st.floats(0, 1, exclude_max=True),
)
@example(3000, 0, 1e-5, 0, 1.0, 0.0, None, 0.999)
@example(3000, 0, 1e300, 0, 1.0, 0.0, None, 0.999)
@example(3000, 0, 1.0, 0, 1e-320, 0.0, None, 0.999)
@example(3000, 0, 1.0, 0, 1.0, 1.0, None, 0.999)
def test_a_draw_is_from_the_distribution_of_transformers(
    vocab_size: int,
    seed: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    penalty: float | None,
    number: float,
) -> None:
    """A12: filters and probabilities are those of transformers in float64, at every edge of the settings."""
    logits = logits_of(vocab_size, seed)
    penalised = adjustment(penalty, counts={0: 1, vocab_size - 1: 0}) if penalty else None
    sampling = replace(PLAIN, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, adjustment=penalised)
    with mock.patch.object(sampler, "uniform", return_value=number):
        [token] = sample(logits[None], [sampling])
    start, end = share_of(scores_in_transformers(logits, sampling), token.id)
    if not start - 1e-9 <= number <= end + 1e-9:  # a tie: the kept tokens are `top_p` together, but for rounding
        nearly = replace(sampling, top_p=top_p * (1 - 1e-12))
        start, end = share_of(scores_in_transformers(logits, nearly), token.id)
    assert start - 1e-9 <= number <= end + 1e-9
    assert end > start or number == end


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "changes",
    [
        *[{"temperature": temperature} for temperature in (LEAST, 1e-310, 1e-40, 1e-38, 1e-9, -0.0)],
        {"temperature": 1e-40, "top_k": 50},
        {"temperature": 1e-40, "top_p": 0.9},
        {"top_p": 1e-12},
        {"top_p": LEAST},
        {"top_p": 0.0},
        {"top_k": 1, "temperature": 100.0},
    ],
)
@pytest.mark.parametrize("vocab_size", [60, 3000])
def test_settings_whose_limit_is_the_likeliest_token_give_it(
    vocab_size: int, changes: dict[str, float], dtype: torch.dtype
) -> None:
    """A12: the greedy token, also where several have the same logit, as in bfloat16 they often have."""
    logits = torch.stack([logits_of(vocab_size, seed).to(dtype) for seed in range(20)])
    logits[:10, 7::9] = logits.max()
    samplings = [replace(PLAIN, position=position, **changes) for position in range(20)]  # type: ignore[arg-type]
    greedy = sample(logits, [replace(PLAIN, temperature=0.0)] * 20)
    assert sample(logits, samplings) == greedy


def test_min_p_of_one_keeps_the_likeliest_and_its_equals() -> None:
    """A12: whatever the temperature."""
    logits = logits_of(60, seed=0)
    logits[[3, 50]] = logits.max() + 1
    drawn = {
        sample(logits[None], [replace(PLAIN, min_p=1.0, temperature=t, position=p)])[0].id
        for p in range(40)
        for t in (1e-5, 1e-4, 0.01, 1.0, 100.0)
    }
    assert drawn == {3, 50}


def test_a_huge_temperature_draws_evenly_but_nothing_that_is_forbidden() -> None:
    """A12: minus infinity divided by anything stays minus infinity."""
    masked = replace(PLAIN, temperature=1e300, token_mask=bytes([0b10101010]))
    forbidden = replace(PLAIN, temperature=1e300, adjustment=adjustment(biases=dict.fromkeys((0, 2, 4, 6), -math.inf)))
    for sampling in (masked, forbidden):
        draws = [sample(logits_of(8, seed=3)[None], [replace(sampling, position=p)])[0].id for p in range(400)]
        counts = torch.tensor(draws).bincount(minlength=8)
        assert counts[::2].sum() == 0
        assert counts[1::2].min() > 60


@pytest.mark.parametrize("penalty", [LEAST, 1e-300, 1e-40, 1e-3, 100.0])
@pytest.mark.parametrize("temperature", [0.0, LEAST, 1e-40, 1.0, 100.0])
def test_penalties_and_biases_at_their_limits_never_give_what_is_no_number(penalty: float, temperature: float) -> None:
    """A12: a penalised likely token comes before all others, or after them; a bias of -100 forbids, +100 forces."""
    logits = torch.tensor([5.0, 4.0, -3.0, 0.0, 1.0])
    extreme = adjustment(penalty, counts={0: 10**6, 2: 0}, presence=2.0, biases={1: -100.0, 4: 100.0})
    [token] = sample(logits[None], [replace(PLAIN, temperature=temperature, adjustment=extreme)])
    adjusted = logits.double()
    sampler.adjust(adjusted, extreme)
    assert adjusted.isfinite().all()
    expected = 0 if penalty < 0.01 else 4
    assert token.id == expected or temperature == 100.0
    assert math.isfinite(token.logprob)


def test_the_settings_of_a_request_accept_a_temperature_of_minus_zero_and_of_1e_40() -> None:
    """A12: both are greedy in effect, and neither is refused."""
    assert SamplingParams(temperature=-0.0).temperature == 0
    assert SamplingParams(temperature=1e-40).temperature == 1e-40
