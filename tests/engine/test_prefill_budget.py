from __future__ import annotations

import pytest

from mdi.engine.prefill_budget import FEWEST, PAUSE_S, PrefillBudget


@pytest.mark.parametrize("n_nodes", [1, 2, 4])
@pytest.mark.parametrize("tokens_per_s", [200.0, 300.0, 500.0])
def test_prompts_take_as_long_as_streams_may_wait(tokens_per_s: float, n_nodes: int) -> None:
    pace = PrefillBudget(512, n_nodes)
    for _ in range(3):
        pace.note(pace.tokens, pace.tokens / (tokens_per_s * n_nodes))  # a stage has its share of the layers
    assert pace.tokens / tokens_per_s == pytest.approx(PAUSE_S, rel=0.03)


def test_fast_machines_take_whole_batches_and_slow_ones_a_few_tokens() -> None:
    pace = PrefillBudget(512, n_nodes=1)
    assert pace.tokens == FEWEST
    pace.note(512, 0.01)
    assert pace.tokens == 512
    pace.note(512, 100)
    assert pace.tokens == FEWEST


def test_small_batches_say_nothing() -> None:
    pace = PrefillBudget(512, n_nodes=1)
    pace.note(400, 1.0)
    before = pace.tokens
    pace.note(FEWEST - 1, 100.0)
    assert pace.tokens == before


def test_a_small_token_budget_is_kept() -> None:
    pace = PrefillBudget(5, n_nodes=3)
    assert pace.tokens == 5
    pace.note(5, 1000.0)
    assert pace.tokens == 5
