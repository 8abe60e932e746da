"""The tables of all commands at 80 columns: nothing is cut, also with long names and large numbers."""

from __future__ import annotations

import io
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console, RenderableType

from mdi.checkpoint.published import PUBLISHED
from mdi.cli import cache, cluster, demo, plan, screen
from mdi.cli.demo_agent import AgentStep
from mdi.cli.sample_questions import AnsweredQuestion, sample_questions
from mdi.core.group import Rank
from mdi.core.quantization import ModelQuantization
from mdi.core.status import NodeStatus
from mdi.models.registry import read_config
from mdi.planning.hardware import Machine
from mdi.planning.plan import make_plan
from mdi.planning.predict import stage_summary

WIDTH = 80


def shown(*tables: RenderableType) -> str:
    """What a terminal of 80 columns shows."""
    console = Console(width=WIDTH, record=True, file=io.StringIO(), markup=False, emoji=False, highlight=False)
    for table in tables:
        console.print(table)
    text = console.export_text()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= WIDTH
    return text


def assert_whole(text: str, *words: str) -> None:
    assert [word for word in words if word not in text] == []


NODE = NodeStatus(
    "secondary10", "receiving", 100, 109, "bfloat16", "cuda:1", 145_412 * 10**6, 123456, 1.0, 0, 0,
    kernels="avx512-vnni", quantization=ModelQuantization("int4", "int8", "int8"),
    shards=Rank(1, 2, 2),
)  # fmt: skip


def test_nodes_of_a_server() -> None:
    names = ["starter", "secondary10", "spare0"]
    text = shown(screen.nodes_table("Qwen2-VL-72B-Instruct", [replace(NODE, name=name) for name in names]))
    assert_whole(text, *names, "50% of", "100-108", "145,412 MB", "bfloat16,", "cuda:1", "avx512-vnni")


def test_nodes_that_are_waited_for() -> None:
    node = SimpleNamespace(name="secondary10", address="a-machine-in-the-cellar.example.com:5000")
    note = "nothing listens there: start it with `mdi secondary --nodes-config nodes.json 10`"
    startup = screen.Startup()
    startup.waiting([SimpleNamespace(node=node, there=False, missing=True, note=note)])  # type: ignore[list-item]
    assert_whole(shown(startup._render()), "secondary10", "missing", "nothing", "nodes.json")


@pytest.mark.parametrize("model", PUBLISHED)
def test_a_plan_with_and_without_machines(model: str) -> None:
    config = read_config(PUBLISHED[model])
    machine = Machine(memory_bytes=128 * 10**9, bytes_per_s=204.8 * 10**9, flops_per_s=90.25 * 10**12)
    slow = Machine(memory_bytes=0.5 * 10**9, bytes_per_s=0.1 * 10**9, flops_per_s=0.01 * 10**12)
    made = make_plan(config, min(4, config.n_layers), None, dtype="float32")
    rows = [(name, spec, stage_summary(config, spec, "float32", 10**6)) for name, spec in made.roles.items()]
    stages, machines = shown(plan._stages_table(rows)), shown(plan._machines_table(rows, [machine, slow] * 2))
    for name, _, summary in rows:
        assert_whole(stages, name, f"{summary.parameters:,}", f"{summary.size_bytes / 1e6:,.0f}")
        assert_whole(machines, name, f"{summary.size_bytes / 1e6:,.0f}", f"{summary.cache_bytes / 1e6:,.0f}")
    assert_whole(machines, "computes", "90.25", "204.8", "128.0", "prompt")


def test_machines_of_a_running_server() -> None:
    def node(name: str, sent: int) -> dict[str, Any]:
        return {
            "name": name, "replica": "k3j9x2ab", "state": "receiving", "first_layer": 100, "last_layer": 110,
            "dtype": "bfloat16", "resident_bytes": 145_412 * 10**6, "busy_share": 1.0, "round_trip_s": 1.2345,
            "device": "cuda:1", "kernels": "avx512-vnni", "pid": 1, "sent_bytes": sent, "received_bytes": 0,
            "error": f"{name} did not answer for 5 seconds",
        }  # fmt: skip

    def report(sent: int, seconds: float) -> cluster.Snapshot:
        nodes = [node("starter", sent), node("secondary10", sent)]
        requests = {"running": 16, "waiting": 240, "generated_tokens": sent}
        report = {
            "model": "Qwen/Qwen2-VL-72B-Instruct", "nodes": nodes, "plan": {"reason": "word " * 40},
            "requests": requests, "cache": {"used_share": 0.5}, "recoveries": 2, "failed_requests": 1,
            "recovering": True,
        }  # fmt: skip
        return cluster.Snapshot(report, seconds)

    text = shown(cluster._shown(report(2 * 10**10, 2.0), report(0, 1.0)))
    assert_whole(
        text, "secondary10", "k3j9x2ab", "receiving", "100-109", "145,412", "20000.00", "1234.5", "avx512-vnni"
    )


def test_entries_of_the_cache() -> None:
    entry = SimpleNamespace(
        name="9" * 64,
        contents="Qwen2-VL-72B-Instruct, bfloat16, int4: finisher, secondary0, secondary1",
        size_bytes=145 * 10**9,
        used_s=time.time(),
        in_use=True,
    )
    text = shown(cache.entries_table([entry]))  # type: ignore[list-item]
    assert_whole(text, "9" * cache.NAME_WIDTH, "145.00", "Qwen2-VL-72B-Instruct,")


def test_answers_of_the_demo() -> None:
    answers = [AnsweredQuestion(sample, "word " * 20, 100.0) for sample in sample_questions()]
    steps = [AgentStep("model calls", '{"figure":"' + "x" * 200 + '"}', None)]
    text = shown(demo._answers_table(answers), demo._steps_table(steps))
    assert_whole(text, "question", "100.00", "model calls")
    assert text.count("x") >= 200
