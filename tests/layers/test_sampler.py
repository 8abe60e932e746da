from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from mdi.core.batch import LogitAdjustment, TokenSampling, token_bits
from mdi.layers import sampler
from mdi.layers.sampler import sample, uniform

PLAIN = TokenSampling(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=7, sample=0, position=0)


def draws(n: int, **changes: float) -> list[TokenSampling]:
    return [replace(PLAIN, position=position, **changes) for position in range(n)]  # type: ignore[arg-type]


def test_temperature_zero_is_the_likeliest_token() -> None:
    logits = torch.randn(5, 300)
    tokens = sample(logits, draws(5, temperature=0.0))
    assert [token.id for token in tokens] == logits.argmax(-1).tolist()
    expected = logits.log_softmax(-1).max(-1).values
    assert torch.allclose(torch.tensor([token.logprob for token in tokens]), expected)


def test_draws_follow_the_distribution() -> None:
    probabilities = torch.tensor([0.1, 0.5, 0.05, 0.3, 0.05])
    tokens = sample(probabilities.log().repeat(4000, 1), draws(4000))
    counts = torch.bincount(torch.tensor([token.id for token in tokens]), minlength=5) / 4000
    assert torch.allclose(counts, probabilities, atol=0.03)


def test_the_uniform_number_depends_on_seed_sample_and_position_only() -> None:
    base = uniform(PLAIN)
    assert base == uniform(replace(PLAIN, temperature=0.3, top_k=5))
    others = [uniform(replace(PLAIN, seed=8)), uniform(replace(PLAIN, sample=1)), uniform(replace(PLAIN, position=1))]
    assert len({base, *others}) == 4
    assert 0 <= uniform(replace(PLAIN, seed=-1)) < 1
    assert 0 <= uniform(replace(PLAIN, seed=2**64 - 1)) < 1


def test_a_draw_does_not_depend_on_the_rest_of_the_batch() -> None:
    logits = torch.randn(8, 5000)
    wanted = [replace(PLAIN, position=i, seed=i, top_p=0.9) for i in range(8)]
    together = sample(logits, wanted)
    assert together == tuple(sample(logits[i : i + 1], wanted[i : i + 1])[0] for i in range(8))


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({"top_k": 2}, {1, 3}),
        ({"top_k": 1}, {1}),
        ({"top_p": 0.75}, {1, 3}),
        ({"top_p": 0.49}, {1}),
        ({"min_p": 0.15}, {0, 1, 3}),
        ({"min_p": 1.0}, {1}),
        ({"top_k": 3, "top_p": 0.99}, {0, 1, 3}),
        ({"top_k": 99}, {0, 1, 2, 3, 4}),
    ],
)
def test_filters_keep_what_they_should(changes: dict[str, float], kept: set[int]) -> None:
    logits = torch.tensor([0.1, 0.5, 0.04, 0.3, 0.06]).log()
    tokens = sample(logits.repeat(600, 1), draws(600, **changes))
    assert {token.id for token in tokens} == kept


@pytest.mark.parametrize("changes", [{}, {"top_p": 0.97}, {"top_p": 0.9999}, {"min_p": 0.001}, {"temperature": 3.0}])
def test_sorting_the_likeliest_first_changes_no_draw(
    changes: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = torch.randn(200, 3000) * 2
    shortcut = sample(logits, draws(200, **changes))
    monkeypatch.setattr(sampler, "FIRST_CANDIDATES", 10**9)
    assert sample(logits, draws(200, **changes)) == shortcut


def adjustment(
    seen: dict[int, int] | None = None, biases: dict[int, float] | None = None, **penalties: float
) -> TokenSampling:
    seen, biases = seen or {}, biases or {}
    made = LogitAdjustment(
        penalties.get("repetition", 1.0),
        penalties.get("presence", 0.0),
        penalties.get("frequency", 0.0),
        bytes(token_bits(seen)),
        np.array(list(seen), "<u4").tobytes(),
        np.array(list(seen.values()), "<u4").tobytes(),
        tuple(biases),
        tuple(biases.values()),
    )
    return replace(PLAIN, temperature=0.0, adjustment=made)


def test_a_repetition_penalty_is_that_of_transformers() -> None:
    logits = torch.randn(1, 50, dtype=torch.float64)
    theirs = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([[3, 7, 7, 11]]), logits.clone())
    ours = logits[0].clone()
    made = adjustment({3: 0, 7: 2, 11: 1}, repetition=1.7).adjustment
    assert made
    sampler.adjust(ours, made)
    assert torch.equal(ours, theirs[0])


def test_presence_counts_once_and_frequency_every_time() -> None:
    ours = torch.zeros(5)
    made = adjustment({0: 0, 1: 1, 2: 3}, presence=0.5, frequency=0.25).adjustment
    assert made
    sampler.adjust(ours, made)
    assert ours.tolist() == [0.0, -0.75, -1.25, 0.0, 0.0]


def test_biases_force_and_forbid_tokens() -> None:
    logits = torch.randn(3, 40)
    best = int(logits[1].argmax())
    forced, forbidden = adjustment(biases={5: 100.0}), adjustment(biases={best: -math.inf})
    tokens = sample(logits, [forced, forbidden, replace(PLAIN, temperature=0.0)])
    assert tokens[0].id == 5
    assert tokens[1].id == int(logits[1].topk(2).indices[1])
    assert tokens[2].id == int(logits[2].argmax())


def test_logprobs_are_the_models_own_whatever_is_adjusted() -> None:
    logits = torch.randn(1, 40)
    [token] = sample(logits, [replace(adjustment(biases={5: 100.0}), top_logprobs=3)])
    expected = logits[0].log_softmax(-1)
    values, ids = expected.topk(3)
    assert token.logprob == pytest.approx(float(expected[5]))
    assert [token_id for token_id, _ in token.top_logprobs] == ids.tolist()
    assert [logprob for _, logprob in token.top_logprobs] == pytest.approx(values.tolist())


def test_no_more_top_logprobs_are_reported_than_there_are_tokens() -> None:
    [token] = sample(torch.randn(1, 4), [replace(PLAIN, top_logprobs=20)])
    assert len(token.top_logprobs) == 4


def mask_of(*token_ids: int, size: int = 300) -> bytes:
    allowed = torch.zeros(-(-size // 8) * 8, dtype=torch.uint8)
    allowed[list(token_ids)] = 1
    return np.packbits(allowed.numpy(), bitorder="little").tobytes()


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_a_masked_draw_is_the_draw_from_the_allowed_tokens_alone(temperature: float) -> None:
    logits, allowed = torch.randn(1, 300), [3, 8, 150, 299]
    masked = draws(200, temperature=temperature, token_mask=mask_of(*allowed))  # type: ignore[arg-type]
    tokens = [sample(logits, [sampling])[0] for sampling in masked]
    alone = [sample(logits[:, allowed], [replace(sampling, token_mask=None)])[0] for sampling in masked]
    assert [token.id for token in tokens] == [allowed[token.id] for token in alone]
    assert torch.allclose(
        torch.tensor([token.logprob for token in tokens]),
        logits.log_softmax(-1)[0, [token.id for token in tokens]],
    )


def test_a_mask_forbids_what_a_bias_forces_and_tokens_that_it_does_not_reach() -> None:
    forced = replace(adjustment(biases={5: 100.0}), token_mask=mask_of(4, size=8))
    assert sample(torch.randn(1, 300), [forced])[0].id == 4


def test_a_masked_row_leaves_the_others_alone() -> None:
    logits = torch.randn(2, 300)
    tokens = sample(logits, [replace(PLAIN, temperature=0.0, token_mask=mask_of(9)), replace(PLAIN, temperature=0.0)])
    assert [token.id for token in tokens] == [9, int(logits[1].argmax())]


@pytest.mark.parametrize("changes", [{"top_k": 30}, {"top_p": 0.9}, {"min_p": 0.01}])
def test_only_tokens_that_the_mask_allows_pass_the_filters(changes: dict[str, float]) -> None:
    logits, allowed = torch.randn(40, generator=torch.Generator().manual_seed(0)), {0, 7, 8, 13, 31, 33, 39}
    masked = [replace(wanted, token_mask=mask_of(*allowed, size=40)) for wanted in draws(400, **changes)]
    drawn = {token.id for token in sample(logits.repeat(400, 1), masked)}
    assert drawn <= allowed
    assert len(drawn) > 2


@pytest.mark.parametrize("vocab_size", [50, 3000])
def test_a_forbidden_token_is_not_drawn_by_rounding(vocab_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "uniform", lambda _: 1.0)  # what a draw just below 1 can be rounded to
    [token] = sample(torch.randn(1, vocab_size), [replace(PLAIN, token_mask=mask_of(5, size=8))])
    assert token.id == 5
