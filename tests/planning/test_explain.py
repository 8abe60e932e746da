"""Why the layers of a running engine are split as they are."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mdi import Engine
from mdi.checkpoint.prepare import prepare
from mdi.checkpoint.source import open_source
from mdi.core.quantization import UNQUANTIZED
from mdi.planning.explain import ALONE, EVEN, FOUND, GIVEN, GROUPED, explain
from mdi.planning.plan import make_plan


@pytest.mark.parametrize(
    ("prepared", "asked", "n_nodes", "reason"),
    [(None, None, 1, ALONE), (None, None, 2, EVEN), (None, (1, 5), 2, GIVEN), ((5, 1), None, 2, FOUND)],
    ids=["one node", "alike", "given", "prepared earlier"],
)
def test_the_reason_is_that_of_the_split(
    prepared: tuple[int, ...] | None,
    asked: tuple[int, ...] | None,
    n_nodes: int,
    reason: str,
    tiny_checkpoint: Path,
    tmp_path: Path,
) -> None:
    path = Path(shutil.copytree(tiny_checkpoint, tmp_path / "model", ignore=shutil.ignore_patterns("chunks")))
    if prepared:
        prepare(open_source(path), n_nodes, layers=prepared)
    with Engine(path, n_nodes=n_nodes, layers=asked) as engine:
        assert engine.plan.reason == reason
        if layers := prepared or asked:
            assert tuple(stage.last_layer - stage.first_layer for stage in engine.plan.stages) == layers


def test_a_group_s_nodes_have_a_stage_and_a_rank_there(tiny_checkpoint: Path) -> None:
    config = open_source(tiny_checkpoint).model_config
    plan = make_plan(config, 3, groups=(2, 1), vision_node=True)
    status = explain(plan, config, "float32", UNQUANTIZED, GROUPED)
    places = {stage.node: (stage.group, stage.rank) for stage in status.stages}
    assert places == {"starter": (0, 0), "secondary0": (0, 1), "finisher": (1, 0), "vision": (None, None)}
    first, second, _, _ = status.stages
    assert (first.first_layer, first.last_layer) == (second.first_layer, second.last_layer)
    assert first.step_share == pytest.approx(second.step_share, abs=0.02)  # but for norms
