"""Every layer on exactly one node, whatever the numbers, and no node slower than it must be."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from testing.checkpoints import tiny_config, tiny_text_config

from mdi.checkpoint.published import QWEN2_VL_2B
from mdi.core.errors import ConfigError
from mdi.core.group import Rank
from mdi.core.quantization import ModelQuantization
from mdi.models.config import StageSpec
from mdi.models.registry import read_config
from mdi.planning.hardware import Machine
from mdi.planning.plan import Plan, balance, make_plan, role_names
from mdi.planning.predict import StageLoad, stage_summary

FULL_SIZE = read_config(QWEN2_VL_2B)
TINY = read_config(tiny_config())
TEXT_ONLY = read_config(tiny_text_config())


def test_every_layer_is_on_exactly_one_node_for_all_counts() -> None:
    for n_layers in range(1, 91):
        config = replace(FULL_SIZE if n_layers == 28 else TINY, n_layers=n_layers)
        for n_nodes in range(1, min(n_layers, 12) + 1):
            stages = make_plan(config, n_nodes).stages
            assert [layer for stage in stages for layer in stage.layers] == list(range(n_layers))
            assert len(stages) == n_nodes
            assert all(stage.layers for stage in stages)
            assert [stage.embedding for stage in stages] == [index == 0 for index in range(n_nodes)]
            assert [stage.vision for stage in stages] == [index == 0 for index in range(n_nodes)]
            assert [stage.head for stage in stages] == [index == n_nodes - 1 for index in range(n_nodes)]


@pytest.mark.parametrize(("layer", "head", "start"), [(10, 50, 3), (10, 0, 0), (7, 1, 40), (10, 500, 20), (3, 7, 7)])
def test_no_split_has_a_faster_slowest_node_nor_is_any_as_fast_one_more_even(layer: int, head: int, start: int) -> None:
    for n_layers in range(1, 13):
        for n_nodes in range(1, n_layers + 1):
            loads = [StageLoad(0, layer, n_layers)] * n_nodes
            loads[0] = replace(loads[0], fixed=start)
            loads[-1] = replace(loads[-1], fixed=loads[-1].fixed + head)
            ours = rating(balance(n_layers, loads), loads)
            assert ours == min(rating(split, loads) for split in all_splits(n_layers, n_nodes))


@given(
    n_layers=st.integers(1, 11),
    loads=st.lists(st.builds(StageLoad, *[st.integers(1, 9)] * 3), min_size=1, max_size=5),
)
def test_no_split_that_fits_unequal_machines_is_better(n_layers: int, loads: list[StageLoad]) -> None:
    assume(len(loads) <= n_layers <= sum(load.most for load in loads))
    ours = balance(n_layers, loads)
    assert fits(ours, loads)
    fitting = [split for split in all_splits(n_layers, len(loads)) if fits(split, loads)]
    assert rating(ours, loads) == min(rating(split, loads) for split in fitting)


def fits(split: tuple[int, ...], loads: list[StageLoad]) -> bool:
    return all(count <= load.most for count, load in zip(split, loads, strict=True))


def rating(split: tuple[int, ...], loads: list[StageLoad]) -> tuple[float, float]:
    costs = [load.cost(count) for count, load in zip(split, loads, strict=True)]
    return max(costs), sum(cost**2 for cost in costs)


def all_splits(n_layers: int, n_nodes: int) -> list[tuple[int, ...]]:
    cuts = [(0, *chosen, n_layers) for chosen in combinations(range(1, n_layers), n_nodes - 1)]
    return [tuple(end - start for start, end in pairwise(cut)) for cut in cuts]


def test_the_finisher_of_the_2b_model_gets_fewer_layers_than_the_others() -> None:
    first, middle, last = make_plan(FULL_SIZE, 3).layers
    assert first + middle + last == 28
    assert abs(first - middle) <= 1
    assert 4 <= middle - last <= 6


def test_a_machine_twice_as_fast_gets_about_twice_as_many_layers() -> None:
    fast, slow = Machine(40e9, 1e12), Machine(20e9, 0.5e12)
    first, middle, last = make_plan(FULL_SIZE, 3, machines=[slow, fast, slow]).layers
    assert middle == pytest.approx(2 * first, abs=1)
    assert last < first


def test_memory_limits_what_a_fast_machine_gets() -> None:
    fast, slow = Machine(100e9, 1e13, memory_bytes=1e9), Machine(20e9, 0.5e12)
    stages = make_plan(FULL_SIZE, 3, machines=[slow, fast, slow], dtype="bfloat16", cache_tokens=4096).stages
    middle = stage_summary(FULL_SIZE, stages[1], "bfloat16", 4096)
    assert 0.9e9 < middle.size_bytes + middle.cache_bytes <= 1e9


@pytest.mark.parametrize(
    ("memory_gb", "layers", "message"),
    [
        ((8, 0.01, 8), None, "secondary0 cannot hold 1 layer: of its 0.0 GB, 0.1 GB are missing. Add a node"),
        ((2.5, 0.5, 1.2), None, "room for 19 of the model's 28 layers: 0.9 GB are missing"),
        ((8, 0.9, 8), (10, 10, 8), "secondary0 cannot hold 10 layers: of its 0.9 GB, 0.1 GB are missing"),
    ],
)
def test_what_cannot_fit_is_refused_with_what_is_missing(
    memory_gb: tuple[float, ...], layers: tuple[int, ...] | None, message: str
) -> None:
    machines = [Machine(memory_bytes=gb * 1e9) for gb in memory_gb]
    with pytest.raises(ConfigError, match=message):
        make_plan(FULL_SIZE, 3, layers, machines=machines, dtype="bfloat16", cache_tokens=4096)


def test_layers_that_are_given_are_the_plan() -> None:
    plan = make_plan(FULL_SIZE, 3, (10, 10, 8))
    assert plan.layers == (10, 10, 8)
    assert [(stage.first_layer, stage.last_layer) for stage in plan.stages] == [(0, 10), (10, 20), (20, 28)]


@pytest.mark.parametrize(
    ("n_nodes", "layers", "message"),
    [
        (29, None, "29 nodes are more than the model's 28 layers"),
        (0, None, "at least one node"),
        (-1, None, "at least one node"),
        (3, (14, 14), "names 2 nodes, but there are 3"),
        (3, (10, 10, 9), "add up to 29, but the model has 28"),
        (3, (14, 14, 0), "at least one layer"),
        (3, (15, 14, -1), "at least one layer"),
        (1, (), "names 0 nodes"),
    ],
)
def test_an_impossible_split_is_refused_with_its_reason(
    n_nodes: int, layers: tuple[int, ...] | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_plan(FULL_SIZE, n_nodes, layers)


def test_a_text_only_model_has_no_vision_anywhere() -> None:
    assert not any(stage.vision for stage in make_plan(TEXT_ONLY, 3).stages)


FIRST, MIDDLE, LAST = StageSpec(0, 2, embedding=True), StageSpec(2, 4), StageSpec(4, 6, head=True)


@pytest.mark.parametrize(
    "stages",
    [
        (FIRST, LAST),
        (FIRST, LAST, MIDDLE),
        (FIRST, FIRST, LAST),
        (MIDDLE, LAST),
        (FIRST, MIDDLE),
        (replace(FIRST, embedding=False), MIDDLE, LAST),
        (FIRST, replace(MIDDLE, last_layer=2), replace(LAST, first_layer=2)),
        (FIRST, replace(MIDDLE, head=True), LAST),
    ],
)
def test_a_plan_that_loses_repeats_or_misplaces_anything_cannot_be_made(
    stages: tuple[StageSpec, ...],
) -> None:
    with pytest.raises(ConfigError, match="every layer once"):
        Plan(stages)


ROOT = replace(FIRST, rank=Rank(0, 1, 3))
SECOND = replace(FIRST, embedding=False, rank=Rank(1, 3, 3))


@pytest.mark.parametrize(
    "stages",
    [
        (ROOT, MIDDLE, LAST),
        (ROOT, replace(SECOND, rank=Rank(1, 2, 3)), MIDDLE, LAST),
        (ROOT, replace(SECOND, rank=Rank(2, 3, 3)), MIDDLE, LAST),
        (ROOT, replace(SECOND, rank=Rank(1, 3, 4)), MIDDLE, LAST),
        (ROOT, replace(SECOND, rank=Rank(1, 1, 3)), replace(SECOND, rank=Rank(1, 3, 3)), MIDDLE, LAST),
        (ROOT, replace(SECOND, last_layer=4), replace(MIDDLE, first_layer=4), LAST),
        (SECOND, ROOT, MIDDLE, LAST),
        (ROOT, SECOND, SECOND, MIDDLE, LAST),
        (replace(FIRST, rank=Rank(0, 3, 3)), MIDDLE, LAST),
        (ROOT, SECOND, replace(MIDDLE, rank=Rank(0, 1, 2)), replace(MIDDLE, rank=Rank(1, 2, 2)), LAST),
    ],
)
def test_a_plan_whose_ranks_lose_or_repeat_a_shard_cannot_be_made(stages: tuple[StageSpec, ...]) -> None:
    with pytest.raises(ConfigError, match="every shard once"):
        Plan(stages)


@pytest.mark.parametrize(
    "stages",
    [
        (ROOT, replace(SECOND, embedding=True), MIDDLE, LAST),
        (FIRST, MIDDLE, replace(LAST, rank=Rank(0, 1, 2)), replace(LAST, head=False, rank=Rank(1, 2, 2))),
    ],
)
def test_a_plan_whose_ranks_misplace_the_ends_cannot_be_made(stages: tuple[StageSpec, ...]) -> None:
    with pytest.raises(ConfigError, match="every layer once"):
        Plan(stages)


def test_a_layer_split_has_a_node_a_stage() -> None:
    plan = make_plan(FULL_SIZE, 3)
    assert (plan.groups, plan.n_shards, plan.n_nodes) == ((1, 1, 1), 1, 3)
    assert plan == make_plan(FULL_SIZE, 3, groups=(1, 1, 1))


@pytest.mark.parametrize("groups", [(2,), (3,), (8,), (2, 2), (2, 1, 3), (1, 4), (5, 3)])
def test_the_ranks_of_a_stage_have_its_layers_and_every_shard_once(groups: tuple[int, ...]) -> None:
    plan = make_plan(FULL_SIZE, sum(groups), groups=groups)
    assert (plan.groups, plan.n_nodes, len(plan.layers)) == (groups, sum(groups), len(groups))
    assert sum(plan.layers) == FULL_SIZE.n_layers
    assert [stage.vision for stage in plan.stages] == [index == 0 for index in range(plan.n_nodes)]
    assert sum(stage.head for stage in plan.stages) == groups[-1]
    assert list(plan.roles) == list(role_names(plan.n_nodes))


def test_the_layers_of_stages_may_be_given_with_their_groups() -> None:
    plan = make_plan(FULL_SIZE, 3, (20, 8), groups=(2, 1))
    assert plan.layers == (20, 8)
    assert [stage.layers for stage in plan.stages] == [range(20), range(20), range(20, 28)]


@pytest.mark.parametrize(
    ("groups", "options", "message"),
    [
        ((9,), {}, "a group of 9 is too large: a stage has 8 ranks at most"),
        ((0, 3), {}, "groups 0,3: every stage needs at least one node"),
        ((), {"n_nodes": 2}, "every stage needs at least one node"),
        ((2, 2), {"n_nodes": 3}, "groups 2,2 are 4 nodes in all, but there are 3"),
        ((4,), {"shards": 3}, "a group of 4 needs a shard for each rank, and --shards says 3"),
        ((2,), {"shards": 13}, "13 shards are too many for the model's query heads, 12"),
        ((2, 2), {"layers": (10, 10, 4, 4)}, "layers 10,10,4,4 names 4 stages, but there are 2"),
        ((2, 2), {"layers": (28, 0)}, "every stage needs at least one layer"),
    ],
)
def test_groups_that_cannot_be_are_refused_with_their_reason(
    groups: tuple[int, ...], options: dict[str, Any], message: str
) -> None:
    n_nodes = options.pop("n_nodes", sum(groups))
    with pytest.raises(ConfigError, match=message):
        make_plan(FULL_SIZE, n_nodes, groups=groups, **options)


def test_a_group_larger_than_the_model_has_shards_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"a group of 5 is too large: the model's 4 query heads .* 4 shards at most"):
        make_plan(TINY, 5, groups=(5,))
    with pytest.raises(ConfigError, match=r"a group of 2 is too large.* 1 shard at most"):
        make_plan(TINY, 2, groups=(2,), quantization=ModelQuantization("int8"))  # groups of 64 inputs: all four heads


def test_more_stages_than_layers_are_refused_and_more_nodes_are_not() -> None:
    small = replace(FULL_SIZE, n_layers=2)
    assert make_plan(small, 4, groups=(2, 2)).layers == (1, 1)
    with pytest.raises(ConfigError, match="3 stages are more than the model's 2 layers"):
        make_plan(small, 4, groups=(1, 1, 2))


def test_machines_that_are_left_out_have_no_role_and_the_others_keep_theirs() -> None:
    plan = replace(make_plan(FULL_SIZE, 3), left_out=(1, 4))
    assert plan.n_machines == 5
    assert plan.places == (0, 2, 3)
    assert list(plan.roles) == ["starter", "secondary1", "secondary2"]
    assert plan.unused == ("secondary0", "finisher")
    for left_out in ((0,), (4,), (2, 1), (1, 1)):
        with pytest.raises(ConfigError, match="can leave out machines that there are, but the starter"):
            replace(make_plan(FULL_SIZE, 3), left_out=left_out)


def test_roles_run_from_starter_to_finisher() -> None:
    assert role_names(1) == ("starter",)
    assert role_names(2) == ("starter", "finisher")
    assert role_names(4) == ("starter", "secondary0", "secondary1", "finisher")
