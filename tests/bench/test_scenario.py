"""Scenarios and their prompts."""

from __future__ import annotations

from mdi.bench.scenario import Scenario, sweep


def test_a_sweep_varies_one_thing_at_a_time() -> None:
    scenarios = sweep([1, 4], [16, 64], [56], answer_tokens=5)
    assert [scenario.name for scenario in scenarios] == ["1 x 16", "4 x 16", "1 x 64", "1 x 16 + 56²"]


def test_no_prompt_is_like_another() -> None:
    prompts = [str(prompt) for seed in range(3) for prompt in Scenario(4, 8, 28, 1).prompts(seed)]
    assert len(set(prompts)) == 12
