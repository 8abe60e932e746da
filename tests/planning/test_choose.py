"""The plan that is predicted to be best, against every other and against sums done by hand."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise

import pytest
from testing.checkpoints import tiny_config

from mdi.checkpoint.published import QWEN2_VL_2B
from mdi.core.errors import ConfigError
from mdi.core.quantization import ModelQuantization
from mdi.models.config import StageSpec
from mdi.models.registry import read_config
from mdi.planning.choose import EXCHANGE_S, HOP_S, WORTHWHILE, Candidate, Goal, Job, Links, choose, predict
from mdi.planning.hardware import LinkSpeed, Machine
from mdi.planning.predict import stage_summary

FULL_SIZE = read_config(QWEN2_VL_2B)
INT4 = ModelQuantization("int4", "int4")
FAST, SLOW = Machine(60e9), Machine(5e9)
LOOPBACK, GIGABIT, DISTANT = LinkSpeed(20e-6, 5e9), LinkSpeed(0.2e-3, 125e6), LinkSpeed(1e-3, 125e6)
BFLOAT16 = Job(FULL_SIZE, "bfloat16")


def links(speed: LinkSpeed, n_nodes: int = 8) -> Links:
    return Links(dict.fromkeys(combinations(range(n_nodes), 2), speed))


def best(job: Job, machines: list[Machine], speed: LinkSpeed) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Which machines, and how many of them in each stage."""
    found = choose(job, machines, links(speed)).best
    return found.plan.places, found.plan.groups


def job(optimize: Goal) -> Job:
    return Job(FULL_SIZE, "bfloat16", INT4, optimize)


def test_two_equal_machines_with_a_fast_link_are_a_group() -> None:
    assert best(BFLOAT16, [FAST, FAST], LOOPBACK) == ((0, 1), (2,))
    assert best(job("throughput"), [FAST, FAST], LOOPBACK) == ((0, 1), (2,))


def test_over_a_slow_link_one_stream_stays_on_one_machine_and_many_are_split_by_layers() -> None:
    assert best(job("latency"), [FAST, FAST], LinkSpeed(5e-3, 125e6)) == ((0,), (1,))
    computing = Machine(60e9, 0.5e12)
    assert best(job("throughput"), [computing, computing], DISTANT) == ((0, 1), (1, 1))


def test_a_model_that_one_machine_cannot_hold_is_split_by_layers_over_a_slow_link() -> None:
    small = Machine(60e9, memory_bytes=3e9)
    assert best(BFLOAT16, [small, small], LinkSpeed(20e-3, 125e6)) == ((0, 1), (1, 1))


def test_a_slow_machine_is_left_out_and_the_others_keep_their_names() -> None:
    assert best(BFLOAT16, [FAST, FAST, SLOW], LOOPBACK) == ((0, 1), (2,))
    assert best(BFLOAT16, [FAST, SLOW, FAST], LOOPBACK) == ((0, 2), (2,))
    plan = choose(BFLOAT16, [FAST, SLOW, FAST], links(LOOPBACK)).best.plan
    assert list(plan.roles) == ["starter", "finisher"]
    assert plan.unused == ("secondary0",)


def test_no_machine_is_left_out_for_a_gain_that_may_be_an_error_of_the_prediction() -> None:
    machines = [FAST, FAST]
    choice = choose(job("latency"), machines, links(LinkSpeed(0.6e-3, 125e6)))
    alone = next(one for one in choice.candidates if one.plan.n_nodes == 1)
    assert WORTHWHILE < alone.token_s / choice.best.token_s < 1
    assert choice.best.plan.groups == (1, 1)
    assert choice.reason(alone) == "faster by less than a fifth: not enough to leave finisher out"


def test_a_faster_machine_has_more_shards_of_a_group() -> None:
    found = choose(BFLOAT16, [Machine(60e9), Machine(30e9)], links(LOOPBACK)).best
    assert [stage.rank and len(stage.rank.shards) for stage in found.plan.stages] == [2, 1]


def test_a_declined_group_is_explained() -> None:
    choice = choose(job("latency"), [FAST, FAST], links(GIGABIT))
    assert choice.name(choice.best) == "layers over 2 nodes"
    assert choice.declined.startswith("a group of 2 would take ")
    assert "58 exchanges of 0.29 ms cost more than the 7" in choice.declined
    assert choose(BFLOAT16, [FAST, FAST], links(LOOPBACK)).declined == ""


def test_choice_and_runners_up_are_named_in_the_order_of_their_times() -> None:
    choice = choose(BFLOAT16, [FAST, FAST, SLOW], links(LOOPBACK))
    three = (choice.best, *choice.runners_up)
    assert [choice.name(one) for one in three] == [
        "a group of 2 without finisher",
        "starter alone",
        "layers over 2 nodes without finisher",
    ]
    assert [one.token_s for one in three] == sorted(one.token_s for one in choice.candidates)[:3]
    assert all(choice.reason(one) for one in choice.candidates)


def test_the_time_of_a_group_is_that_of_its_slowest_rank_and_of_its_exchanges() -> None:
    """By hand, for one stream: a hidden state has 1536 numbers of 2 bytes, and each rank one of two shards."""
    plan = BFLOAT16.plan([FAST, FAST], (2,))
    found = predict(BFLOAT16, plan, [FAST, FAST], links(GIGABIT))
    assert (found.exchanges, found.hop_s) == (2 * 28 + 2, 0)
    sent_s = 1536 * 2 / 125e6
    exchanges_s = 56 * (EXCHANGE_S + 0.1e-3 + sent_s + 3 * sent_s)  # 3 tokens of a prompt go with each of the answer
    lead_s, gather_s = EXCHANGE_S + 0.1e-3 + sent_s, EXCHANGE_S + 0.1e-3 + 151936 / 2 * 2 / 125e6
    assert found.exchange_s == pytest.approx(exchanges_s + lead_s + gather_s)
    everything = stage_summary(FULL_SIZE, StageSpec.everything(FULL_SIZE), "bfloat16")
    assert found.compute_s == pytest.approx(everything.step_bytes / 2 / 60e9, rel=0.02)
    assert found.token_s == pytest.approx(found.compute_s + found.exchange_s)


def test_one_stream_passes_all_stages_and_many_fill_them() -> None:
    machines, speed = [FAST, FAST], links(DISTANT)
    one = predict(BFLOAT16, BFLOAT16.plan(machines, (1, 1)), machines, speed)
    assert one.token_s == pytest.approx(sum(step.compute_s for step in one.steps) + one.hop_s)
    assert one.hop_s == pytest.approx(2 * (HOP_S + 0.5e-3 + 1536 * 2 / 125e6))
    many = Job(FULL_SIZE, "bfloat16", optimize="throughput", streams=16)
    filled = predict(many, many.plan(machines, (1, 1)), machines, speed)
    slowest_s = 2 * max(step.total_s for step in filled.steps)
    assert filled.token_s == pytest.approx(
        max(slowest_s, sum(step.total_s for step in filled.steps) + filled.hop_s) / 16
    )


@pytest.mark.parametrize("optimize", ["latency", "throughput"])
@pytest.mark.parametrize("speeds", [(60,), (60, 60), (60, 20), (20, 60, 40), (10, 60, 5, 40)])
@pytest.mark.parametrize("speed", [LOOPBACK, GIGABIT, DISTANT], ids=["loopback", "gigabit", "distant"])
def test_no_way_to_group_any_of_the_fastest_machines_is_faster(
    optimize: Goal, speeds: tuple[int, ...], speed: LinkSpeed
) -> None:
    tiny = Job(read_config(tiny_config(num_attention_heads=4)), "bfloat16", optimize=optimize)
    machines, found = [Machine(rate * 1e6) for rate in speeds], links(speed)
    found_plans = list[Candidate]()
    for count in range(1, len(machines) + 1):
        fastest = sorted(range(1, len(machines)), key=lambda node: -speeds[node])[: count - 1]
        nodes = tuple(sorted([0, *fastest]))
        chosen = [machines[node] for node in nodes]
        for n_cuts in range(count):
            for cuts in combinations(range(1, count), n_cuts):
                groups = [last - first for first, last in pairwise([0, *cuts, count])]
                left_out = tuple(place for place in range(len(machines)) if place not in nodes)
                plan = replace(tiny.plan(chosen, groups), left_out=left_out)
                found_plans.append(predict(tiny, plan, machines, found))
    choice = choose(tiny, machines, found)
    with_all = min(one.token_s for one in found_plans if not one.plan.left_out)
    fastest_s = min(one.token_s for one in found_plans)
    assert choice.best.token_s == (fastest_s if fastest_s <= WORTHWHILE * with_all else with_all)
    assert len(choice.candidates) == len(found_plans)


def test_many_machines_are_grouped_evenly() -> None:
    candidates = choose(BFLOAT16, [FAST] * 9, links(GIGABIT, 9)).candidates
    groups = {candidate.plan.groups for candidate in candidates if not candidate.plan.left_out}
    assert groups == {(1,) * 9, (2, 2, 2, 2, 1), (3, 3, 3), (4, 4, 1), (5, 4), (6, 3), (7, 2), (8, 1)}


def test_what_fits_nowhere_is_refused_with_what_is_missing() -> None:
    with pytest.raises(ConfigError, match=r"room for .* of the model's 28 layers"):
        choose(BFLOAT16, [Machine(60e9, memory_bytes=2e9), Machine(60e9, memory_bytes=0.5e9)], Links())
