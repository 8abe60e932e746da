"""Prompts pause running streams no longer than they should, on fast and slow machines."""

from __future__ import annotations

import pytest

from mdi.engine.prefill_budget import MIN_TOKENS, PAUSE_S, PrefillBudget


@pytest.mark.parametrize("n_nodes", [1, 2, 4])
@pytest.mark.parametrize("tokens_per_s", [200.0, 300.0, 500.0])
def test_prompts_take_as_long_as_streams_may_wait(tokens_per_s: float, n_nodes: int) -> None:
    budget = PrefillBudget(512, n_nodes)
    for _ in range(3):
        budget.observe(budget.tokens, budget.tokens / (tokens_per_s * n_nodes))  # a stage has its share of the layers
    assert budget.tokens / tokens_per_s == pytest.approx(PAUSE_S, rel=0.03)


def test_fast_machines_take_whole_batches_and_slow_ones_a_few_tokens() -> None:
    budget = PrefillBudget(512, n_nodes=1)
    assert budget.tokens == MIN_TOKENS
    budget.observe(512, 0.01)
    assert budget.tokens == 512
    budget.observe(512, 100)
    assert budget.tokens == MIN_TOKENS


def test_small_batches_say_nothing() -> None:
    budget = PrefillBudget(512, n_nodes=1)
    budget.observe(400, 1.0)
    before = budget.tokens
    budget.observe(MIN_TOKENS - 1, 100.0)
    assert budget.tokens == before


def test_a_small_token_budget_is_kept() -> None:
    budget = PrefillBudget(5, n_nodes=3)
    assert budget.tokens == 5
    budget.observe(5, 1000.0)
    assert budget.tokens == 5
