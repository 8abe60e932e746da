"""`mdi bench`: its arithmetic on made-up times, and the whole of it on a tiny model with real nodes."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from mdi.bench.measure import Run, measure, node_times
from mdi.bench.report import node_memory
from mdi.bench.run import limits_for
from mdi.bench.scenario import Scenario, sweep
from mdi.bench.trace import write_trace
from mdi.checkpoint.source import open_source
from mdi.cli.app import app
from mdi.core.errors import ConfigError
from mdi.core.tracing import Span
from mdi.engine import Engine

TWO = Scenario(streams=2, prompt_tokens=10, image_side=None, answer_tokens=3)
NODES = {
    "starter": [Span("encode", 0.0, 0.5), Span("prefill", 0.5, 0.7, 1, 20), Span("decode", 1.0, 1.1, 2, 2)],
    "finisher": [Span("prefill", 0.8, 0.9, 1, 20), Span("decode", 1.4, 1.5, 2, 2)],
}
RUN = Run(TWO, 12, ((1.0, 1.5, 2.0), (1.2, 1.4, 1.6)), NODES)


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


def test_a_sweep_varies_one_thing_at_a_time() -> None:
    scenarios = sweep([1, 4], [16, 64], [56], answer_tokens=5)
    assert [scenario.name for scenario in scenarios] == ["1 x 16", "4 x 16", "1 x 64", "1 x 16 + 56²"]


@pytest.mark.parametrize(
    ("scenario", "what"),
    [
        (Scenario(0, 10, None, 3), "above 0"),
        (Scenario(1, 0, None, 3), "above 0"),
        (Scenario(1, 10, None, 0), "above 0"),
        (Scenario(1, 10, 27, 3), "28 x 28"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(scenario: Scenario, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        limits_for([scenario])


def test_no_prompt_is_like_another() -> None:
    prompts = [str(prompt) for seed in range(3) for prompt in Scenario(4, 8, 28, 1).prompts(seed)]
    assert len(set(prompts)) == 12


def test_every_token_is_timed_and_every_batch_is_somewhere(tiny_checkpoint: Path) -> None:
    scenario = Scenario(streams=3, prompt_tokens=20, image_side=56, answer_tokens=7)
    with Engine(tiny_checkpoint, n_nodes=2, sequence_length=256) as engine:
        run = measure(engine, scenario, seed=1)
        memory = node_memory(open_source(tiny_checkpoint).model_config, engine.nodes(), cache_tokens=16 * 256)
    assert [len(times_s) for times_s in run.times_s] == [7, 7, 7]
    assert all(list(times_s) == sorted(times_s) for times_s in run.times_s)
    assert run.prompt_tokens > 20 + 4
    starter, finisher = run.nodes["starter"], run.nodes["finisher"]
    assert {span.work for span in finisher} == {"prefill", "decode", "sample"}
    assert {span.work for span in starter} == {"fetch", "preprocess", "encode", "prefill", "decode"}
    batches = [span for span in finisher if span.work != "sample"]
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


def test_a_trace_has_every_span_of_every_node(tmp_path: Path) -> None:
    write_trace(tmp_path / "trace.json", [RUN, RUN])
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X" and event["pid"] < 2]
    assert len(spans) == 2 * 5
    assert {event["args"]["name"] for event in events if event["ph"] == "M"} == {"starter", "finisher", "streams"}
    decode = [event for event in spans if event["name"] == "decode"]
    assert decode[0] | {"ts": 0} == decode[2] | {"ts": 0}
    assert decode[2]["ts"] - decode[0]["ts"] > RUN.seconds * 1e6  # one after the other


def bench(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["bench", *arguments])


def test_the_command_writes_what_it_promises(tiny_checkpoint: Path, tmp_path: Path) -> None:
    sizes = ("--streams", "1,2", "--prompt-lengths", "8,32", "--image-sizes", "56", "--answer-tokens", "4")
    files = ("--out", str(tmp_path / "out"), "--trace", str(tmp_path / "trace.json"))
    done = bench(str(tiny_checkpoint), *sizes, *files, "--peer", "transformers")
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert [(one["streams"], one["prompt_tokens"], one["image_side"]) for one in found["scenarios"]] == [
        (1, 8, None),
        (2, 8, None),
        (1, 32, None),
        (1, 8, 56),
    ]
    for one in found["scenarios"]:
        assert one["prompt_tokens_seen"] == one["transformers"]["prompt_tokens_seen"]
        assert 0 < one["first_token_s"] < one["seconds"]
        assert 0 < one["transformers"]["first_token_s"] < one["transformers"]["seconds"]
    with (tmp_path / "out" / "tokens.csv").open() as file:
        assert len(list(csv.reader(file))) == 1 + 4 * (1 + 2 + 1 + 1)
    for name in ("tokens", "throughput", "timeline", "memory"):
        with Image.open(tmp_path / "out" / f"{name}.png") as picture:
            assert len(picture.convert("RGB").getcolors(2**24) or ()) > 10
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("--streams", "one"), "--streams takes whole numbers"),
        (("--image-sizes", "20"), "28 x 28"),
        (("--peer", "vllm"), "--peer knows transformers"),
    ],
)
def test_what_cannot_be_measured_is_refused(tiny_checkpoint: Path, arguments: tuple[str, ...], what: str) -> None:
    done = bench(str(tiny_checkpoint), *arguments)
    assert isinstance(done.exception, ConfigError)
    assert what in str(done.exception)
