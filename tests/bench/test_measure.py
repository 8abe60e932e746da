"""A run in figures, and a real one on a tiny model with two nodes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mdi.bench.measure import measure, node_times
from mdi.bench.report import node_memory
from mdi.bench.scenario import Scenario
from mdi.checkpoint.source import open_source
from mdi.core.group import Rank
from mdi.core.status import NodeStatus
from mdi.engine import Engine
from tests.bench.runs import RUN


def test_a_run_in_figures() -> None:
    assert RUN.seconds == 2.0
    assert RUN.first_token_s == pytest.approx(1.1)
    assert RUN.inter_token_s == pytest.approx(0.35)
    assert RUN.decode_rate == pytest.approx(2 / 1.0 + 2 / 0.4)
    assert RUN.throughput == pytest.approx(6 / 2.0)


def test_where_a_nodes_time_goes() -> None:
    times = node_times(RUN)
    assert times["starter"].work_s == pytest.approx({"encode": 0.5, "prefill": 0.2, "decode": 0.1})
    assert times["starter"].idle_s == pytest.approx(2.0 - 0.8)
    assert times["starter"].hop_s is None
    assert times["finisher"].hop_s == pytest.approx(0.2)  # the median of 0.1 and 0.3


def test_ranks_of_a_stage_hold_its_memory_together(tiny_checkpoint: Path) -> None:
    config = open_source(tiny_checkpoint).model_config
    alone = NodeStatus("starter", "ready", 0, config.n_layers, "float32", "cpu", 10**8, 1, 0.0, 0, 0)
    ranks = [replace(alone, name=name, shards=Rank(at, at + 1, 2)) for at, name in enumerate(["starter", "finisher"])]
    [whole], (first, second) = (node_memory(config, nodes, cache_tokens=640) for nodes in ([alone], ranks))
    assert first.head + second.head == pytest.approx(whole.head, rel=0.01)  # norms are on both
    assert first.cache + second.cache == whole.cache
    assert first.layers + second.layers == pytest.approx(whole.layers, rel=0.01)
    assert (first.embedding, first.vision) == (whole.embedding, whole.vision)
    assert second.embedding == second.vision == 0


def test_every_token_is_timed_and_every_batch_is_somewhere(tiny_checkpoint: Path) -> None:
    scenario = Scenario(streams=3, prompt_tokens=20, image_side=56, answer_tokens=7)
    with Engine(tiny_checkpoint, n_nodes=2, sequence_length=256) as engine:
        run = measure(engine, scenario, seed=1)
        memory = node_memory(open_source(tiny_checkpoint).model_config, engine.nodes(), cache_tokens=16 * 256)
    assert [len(times_s) for times_s in run.times_s] == [7, 7, 7]
    assert all(list(times_s) == sorted(times_s) for times_s in run.times_s)
    assert run.prompt_tokens > 20 + 4
    starter, finisher = run.nodes["starter"], run.nodes["finisher"]
    assert {span.name for span in finisher} == {"prefill", "decode", "sample"}
    assert {span.name for span in starter} == {"fetch", "preprocess", "encode", "prefill", "decode"}
    batches = [span for span in finisher if span.name != "sample"]
    assert {span.batch_id: span.n_tokens for span in batches} == {
        span.batch_id: span.n_tokens for span in starter if span.batch_id >= 0
    }
    assert min(span.start_s for span in starter) >= 0
    ends = {span.batch_id: span.end_s for span in starter}
    assert all(ends[span.batch_id] <= span.start_s <= span.end_s <= run.seconds for span in batches)
    weights = sum(node.embedding + node.vision + node.layers + node.head for node in memory)
    stored = (tiny_checkpoint / "model.safetensors").stat().st_size
    assert weights == pytest.approx(stored + memory[0].embedding, rel=0.02)  # tied: both ends hold it
    assert memory[1].vision == memory[1].embedding == memory[0].head == 0
