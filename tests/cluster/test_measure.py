"""Machines measured, and what the plan makes of it: real processes on this machine, which differ by their config."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from testing.checkpoints import tiny_config
from testing.manual_cluster import NODES, ManualCluster, on_loopback
from testing.waiting import wait_for
from typer.testing import CliRunner

from mdi import Engine, SamplingParams
from mdi.checkpoint.manifest import Manifest
from mdi.checkpoint.prepare import chunk_folder
from mdi.checkpoint.random_weights import write_random_checkpoint
from mdi.cli.app import app
from mdi.core.config import ManualNodes
from mdi.core.errors import ConfigError
from mdi.planning import hardware
from mdi.planning.hardware import FILE_NAME, measure_hardware

GREEDY = SamplingParams(temperature=0, max_tokens=8)
LONG = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
PLENTY_GB = 1000.0


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_random_checkpoint(tmp_path / "tiny", tiny_config(num_hidden_layers=8))


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[ManualCluster]:
    with ManualCluster(tmp_path, on_loopback(*NODES)) as nodes:
        yield nodes


def limit(nodes: ManualCluster, **memory_gb: float) -> None:
    """Writes what nodes may use into the nodes-config."""
    document = json.loads(nodes.config.read_text())
    for index, name in enumerate(NODES):
        document["nodes"]["secondary"][index]["memory_gb"] = memory_gb.get(name, PLENTY_GB)
    nodes.config.write_text(json.dumps(document))


def measured_before(nodes: ManualCluster, **bytes_per_s: float) -> None:
    """Leaves measurements where nodes keep theirs."""
    for name, speed in bytes_per_s.items():
        hardware._write(nodes.cache(name), {hardware._key("cpu", "float32"): (speed, 1e12)})


def shown(engine: Engine) -> list[tuple[str, str, str, str]]:
    return [(node.name, node.role, node.node, node.state) for node in engine.nodes()]


def speeds(monkeypatch: pytest.MonkeyPatch, bytes_per_s: float) -> None:
    """What this process measures of itself."""
    monkeypatch.setattr(hardware, "measure_speed", lambda *_: (bytes_per_s, 1e12))


def test_a_machine_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speeds(monkeypatch, 5e9)
    first = measure_hardware("cpu", "float32", tmp_path / "cache")
    assert (first.bytes_per_s, first.flops_per_s) == (5e9, 1e12)
    assert 1e6 < first.memory_bytes < 1e15
    speeds(monkeypatch, 7e9)
    assert measure_hardware("cpu", "float32", tmp_path / "cache").bytes_per_s == 5e9
    assert measure_hardware("cpu", "bfloat16", tmp_path / "cache").bytes_per_s == 7e9
    assert measure_hardware("cpu", "float32", tmp_path / "cache", "int4").bytes_per_s == 7e9


@pytest.mark.parametrize("damage", ["", "[]", "{", '{"a": 1}', '{"a": ["x", "y"]}'])
def test_a_damaged_measurement_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    (tmp_path / FILE_NAME).write_text(damage)
    speeds(monkeypatch, 5e9)
    assert measure_hardware("cpu", "float32", tmp_path).bytes_per_s == 5e9
    speeds(monkeypatch, 7e9)
    assert measure_hardware("cpu", "float32", tmp_path).bytes_per_s == 5e9


@pytest.mark.parametrize("quantization", [None, "int4"])
def test_a_real_measurement_is_of_this_world(quantization: str | None) -> None:
    reads, multiplies = hardware.measure_speed("cpu", "float32", quantization)
    assert 1e8 < reads < 1e13
    assert 1e8 < multiplies < 1e16


def test_a_plan_is_made_for_the_machines_there_are(
    checkpoint: Path, nodes: ManualCluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    speeds(monkeypatch, 1.0)  # the starter is hopeless
    limit(nodes)
    nodes.start_all()
    manual = ManualNodes(nodes.config, wait_s=100)
    with Engine(checkpoint, manual=manual, dtype="float32", sequence_length=64, max_sequences=2) as engine:
        assert engine.chat("Hello", GREEDY).token_ids
    split = Manifest.read(chunk_folder(checkpoint, 3)).plan.layers
    assert split[0] == 1
    assert sum(split) == 8
    for name in NODES:
        assert (nodes.cache(name) / FILE_NAME).exists()


@pytest.mark.slow
@pytest.mark.parametrize("encrypted", [False, True])
def test_a_slow_machine_is_left_out_and_takes_a_lost_nodes_place(
    encrypted: bool, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Engine(checkpoint, dtype="float32", sequence_length=512) as alone:
        undisturbed = alone.chat("Hello", LONG).token_ids
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    speeds(monkeypatch, 1e6)
    options: dict[str, Any] = {"dtype": "float32", "sequence_length": 512, "max_sequences": 2, "encryption": encrypted}
    with ManualCluster(tmp_path, on_loopback(*NODES), encrypted=encrypted, planned=True) as nodes:
        measured_before(nodes, secondary0=1e3, finisher=1e6)
        processes = nodes.start_all()
        options |= {"nodes_config": nodes.config, "certs": nodes.certs("starter"), "wait_s": 100, "spare_after_s": 0.5}
        together = [("starter", "starter", "starter", "ready"), ("finisher", "finisher", "finisher", "ready")]
        for _ in range(2):  # measured, and from the chunks that there are then
            with Engine(checkpoint, **options) as engine:
                assert "secondary0: left out, as a spare" in caplog.text
                caplog.clear()
                wait_for(lambda: len(engine.nodes()) == 3)
                assert shown(engine)[:2] == together
                assert shown(engine)[2][:3] == ("secondary0", "spare", "secondary0")
                assert engine.chat("Hello", LONG).token_ids == undisturbed
        with Engine(checkpoint, **options) as engine:
            stream = engine.submit("Hello", LONG)
            wait_for(lambda: stream.completion_tokens > 20)
            processes["finisher"].popen.kill()
            assert stream.completion().token_ids == undisturbed
            assert shown(engine) == [together[0], ("finisher", "finisher", "secondary0", "ready")]


@pytest.mark.slow
def test_a_starter_that_is_much_faster_than_the_others_is_alone_and_they_wait(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    speeds(monkeypatch, 1e9)
    with ManualCluster(tmp_path, on_loopback(*NODES), planned=True) as nodes:
        measured_before(nodes, secondary0=1e3, finisher=1e3)
        nodes.start_all()
        manual = ManualNodes(nodes.config, wait_s=100)
        for _ in range(2):
            with Engine(checkpoint, manual=manual, dtype="float32", sequence_length=64) as engine:
                wait_for(lambda: [one[1] for one in shown(engine)] == ["starter", "spare", "spare"])
                wait_for(lambda: {one[3] for one in shown(engine)[1:]} == {"waiting"})
                assert engine.chat("Hello", GREEDY).token_ids


def test_what_fits_nowhere_is_refused_before_anything_is_written(
    checkpoint: Path, nodes: ManualCluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    speeds(monkeypatch, 1e9)
    limit(nodes, secondary0=0.3)
    nodes.start_all()
    manual = ManualNodes(nodes.config, wait_s=100)
    with pytest.raises(ConfigError, match=r"secondary0 cannot hold 1 layer: of its 0.0 GB, .* are missing"):
        Engine(checkpoint, manual=manual, dtype="float32", sequence_length=64, max_sequences=2)
    assert not chunk_folder(checkpoint, 3).exists()


def test_the_plan_is_shown_beforehand_and_says_which_node_was_not_measured(
    checkpoint: Path, nodes: ManualCluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "160")
    limit(nodes)
    nodes.start("finisher").wait_for_line("listens")
    done = CliRunner().invoke(app, ["plan", str(checkpoint), "--nodes-config", str(nodes.config)])
    assert done.exit_code == 0, done.output
    assert "GB/s" in done.output
    assert "TFLOP/s" in done.output
    assert "secondary0 was not measured, and is taken to be as fast as this machine: nothing listens" in done.output
    assert "finisher was not measured" not in done.output
    assert not chunk_folder(checkpoint, 3).exists()
