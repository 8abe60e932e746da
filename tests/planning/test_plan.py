"""Every layer on exactly one node, whatever the numbers, and no node slower than it must be."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from testing.checkpoints import tiny_config, tiny_text_config

from mdi.checkpoint.published import QWEN2_VL_2B
from mdi.core.errors import ConfigError
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


def test_roles_run_from_starter_to_finisher() -> None:
    assert role_names(1) == ("starter",)
    assert role_names(2) == ("starter", "finisher")
    assert role_names(4) == ("starter", "secondary0", "secondary1", "finisher")
