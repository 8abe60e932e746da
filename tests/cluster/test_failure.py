"""Nodes killed and frozen while streams run: real processes, real signals. Every stream keeps its tokens."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from testing.processes import node_processes
from testing.waiting import wait_for

from mdi import Engine, SamplingParams
from mdi.checkpoint.prepare import prepare
from mdi.checkpoint.source import open_source
from mdi.core.errors import ClosedError, LinkError
from mdi.engine import Completion, Stream

NODES = ("secondary0", "finisher")
Requests = list[tuple[Any, SamplingParams]]


@pytest.fixture(scope="module")
def requests(photograph: bytes) -> Requests:
    """Eight streams with long prompts: greedy and sampled, one with an image, one with two samples, one that stops."""
    image = [{"type": "image", "image": photograph}, {"type": "text", "text": "What is this? " * 60}]
    prompts: list[Any] = [f"Prompt {number}: " + "many words, " * 150 for number in range(6)]
    prompts += [[{"role": "user", "content": image}], "A short one."]
    params = [
        SamplingParams(temperature=number % 2, seed=number, max_tokens=150 + number, n=1 + (number == 3))
        for number in range(7)
    ]
    params.append(SamplingParams(temperature=1, seed=9, max_tokens=200, stop=["th", "\n\n"]))
    return list(zip(prompts, params, strict=True))


@pytest.fixture(scope="module")
def own_checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("failure") / "tiny"
    return Path(shutil.copytree(tiny_checkpoint, path, ignore=shutil.ignore_patterns("chunks")))


@pytest.fixture(scope="module")
def shared(own_checkpoint: Path) -> Iterator[Engine]:
    with Engine(own_checkpoint, n_nodes=3, sequence_length=4096, recovery_timeout_s=200, max_losses=100) as engine:
        files = psutil.Process().num_fds()
        yield engine
        assert engine.recovery.recoveries >= 8
        gc.collect()  # calls of gRPC refer to themselves, and hold on to their connections
        wait_for(lambda: psutil.Process().num_fds() <= files + 2)  # nothing that grows with every recovery
    assert node_processes() == []


@pytest.fixture(scope="module")
def undisturbed(shared: Engine, requests: Requests) -> list[Completion]:
    return [stream.completion() for stream in submit(shared, requests)]


@pytest.fixture
def engine(shared: Engine, undisturbed: list[Completion]) -> Iterator[Engine]:
    """The shared engine with all its nodes there, checked for what a test leaves behind."""
    yield shared
    wait_for(lambda: not shared.recovery.recovering)
    assert shared.ready(60)
    assert len(node_processes()) == len(NODES)
    assert not shared._requests
    assert shared.recovery.failed_requests == 0


def submit(engine: Engine, requests: Requests) -> list[Stream]:
    return [engine.submit(prompt, params) for prompt, params in requests]


def tokens(completions: list[Completion]) -> list[list[tuple[int, ...]]]:
    return [[sample.token_ids for sample in completion.samples] for completion in completions]


def texts(completions: list[Completion]) -> list[list[str]]:
    return [[sample.text for sample in completion.samples] for completion in completions]


def pid_of(engine: Engine, name: str) -> int:
    return next(node.pid for node in engine.nodes() if node.name == name)


def hit(engine: Engine, *names: str, with_signal: int = signal.SIGKILL) -> None:
    for pid in [pid_of(engine, name) for name in names]:
        os.kill(pid, with_signal)


def decoding(engine: Engine) -> bool:
    """Whether most answers are being written, and have begun."""
    generated = [len(sample.generated) for request in list(engine._loop._live) for sample in request.sequences]
    return len(generated) >= 6 and min(generated) >= 5


def check(engine: Engine, streams: list[Stream], undisturbed: list[Completion], recoveries: int) -> None:
    completions = [stream.completion() for stream in streams]
    assert tokens(completions) == tokens(undisturbed)
    assert texts(completions) == texts(undisturbed)
    assert engine.recovery.recoveries > recoveries, "the node was lost too late"


@pytest.mark.usefixtures("no_process_left")
def test_a_node_whose_chunk_is_gone_fails_its_requests_with_the_cause(own_checkpoint: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(own_checkpoint, tmp_path / "tiny", ignore=shutil.ignore_patterns("chunks")))
    chunks = prepare(open_source(path), 2)
    with Engine(path, n_nodes=2, max_losses=1) as engine:
        stream = engine.submit("Hello", SamplingParams(temperature=0, max_tokens=4000))
        next(stream)
        (chunks / "model_finisher.safetensors").unlink()
        hit(engine, "finisher")
        with pytest.raises(LinkError, match=r"finisher.*no chunk.*lost 2 times"):
            list(stream)
        with pytest.raises(LinkError, match="finisher"):
            engine.submit("Hello")
        assert engine.recovery.failed_requests == 1
        assert engine.nodes()[1].state == "failed"


@pytest.mark.usefixtures("no_process_left")
def test_nodes_that_cannot_be_started_again_fail_their_requests_with_the_cause(
    own_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Engine(own_checkpoint, n_nodes=3) as engine:
        stream = engine.submit("Hello", SamplingParams(temperature=0, max_tokens=3000))
        next(stream)
        with monkeypatch.context() as patched:
            patched.setattr(sys, "executable", "/no/such/python")
            hit(engine, "secondary0")
            with pytest.raises(LinkError, match=r"secondary0 could not be started \(No such file.*6 times"):
                list(stream)
        assert [node.state for node in engine.nodes()] == ["ready", "lost", "ready"]


@pytest.mark.usefixtures("no_process_left")
def test_requests_that_wait_longer_than_the_limit_fail_with_a_clear_error(own_checkpoint: Path) -> None:
    with Engine(own_checkpoint, n_nodes=3, recovery_timeout_s=0.1) as engine:
        streams = [engine.submit("Hello", SamplingParams(temperature=0, max_tokens=3000)) for _ in range(3)]
        next(streams[0])
        hit(engine, "secondary0")
        for stream in streams:
            with pytest.raises(LinkError, match=r"not back within 0\.1 s.*secondary0"):
                list(stream)
        assert engine.recovery.failed_requests == 3


@pytest.mark.usefixtures("no_process_left")
def test_an_engine_closed_while_a_node_comes_back_ends_at_once(own_checkpoint: Path) -> None:
    threads = threading.active_count()
    engine = Engine(own_checkpoint, n_nodes=3)
    stream = engine.submit("Hello", SamplingParams(temperature=0, max_tokens=3000))
    next(stream)
    hit(engine, "secondary0")
    wait_for(lambda: engine.recovery.recovering)
    started = time.monotonic()
    engine.close()
    assert time.monotonic() - started < 15
    with pytest.raises(ClosedError):
        list(stream)
    assert threading.active_count() <= threads


@pytest.mark.parametrize("victim", NODES)
def test_streams_survive_a_node_killed_during_prefill(
    victim: str, engine: Engine, requests: Requests, undisturbed: list[Completion]
) -> None:
    recoveries, results = engine.recovery.recoveries, engine._loop.results
    streams = submit(engine, requests)
    wait_for(lambda: engine._loop.results > results + 2)
    assert not decoding(engine)
    hit(engine, victim)
    check(engine, streams, undisturbed, recoveries)


@pytest.mark.parametrize("victim", NODES)
def test_streams_survive_a_node_killed_during_decode(
    victim: str, engine: Engine, requests: Requests, undisturbed: list[Completion]
) -> None:
    recoveries = engine.recovery.recoveries
    streams = submit(engine, requests)
    wait_for(lambda: decoding(engine))
    hit(engine, victim)
    wait_for(lambda: engine.recovery.recovering)
    assert not engine.ready(5)
    check(engine, streams, undisturbed, recoveries)
    restarts = {node.name: node.restarts for node in engine.nodes()}
    assert restarts["starter"] == 0
    assert restarts[victim] > 0


def test_streams_survive_a_frozen_node(engine: Engine, requests: Requests, undisturbed: list[Completion]) -> None:
    recoveries, frozen = engine.recovery.recoveries, pid_of(engine, "secondary0")
    streams = submit(engine, requests)
    wait_for(lambda: decoding(engine))
    hit(engine, "secondary0", with_signal=signal.SIGSTOP)
    check(engine, streams, undisturbed, recoveries)
    assert not psutil.pid_exists(frozen)


def test_streams_survive_the_death_of_all_other_nodes_at_once(
    engine: Engine, requests: Requests, undisturbed: list[Completion]
) -> None:
    recoveries = engine.recovery.recoveries
    streams = submit(engine, requests)
    wait_for(lambda: decoding(engine))
    hit(engine, *NODES)
    check(engine, streams, undisturbed, recoveries)


def test_streams_survive_a_node_killed_again_while_it_comes_back(
    engine: Engine, requests: Requests, undisturbed: list[Completion]
) -> None:
    recoveries = engine.recovery.recoveries
    streams = submit(engine, requests)
    wait_for(lambda: decoding(engine))
    seen = {process.pid for process in node_processes()}
    hit(engine, "finisher")
    for _ in range(2):
        wait_for(lambda: {process.pid for process in node_processes()} - seen)
        for process in node_processes():
            if process.pid not in seen:
                seen.add(process.pid)
                process.kill()
    check(engine, streams, undisturbed, recoveries)


def test_streams_survive_a_node_killed_while_another_comes_back(
    engine: Engine, requests: Requests, undisturbed: list[Completion]
) -> None:
    recoveries = engine.recovery.recoveries
    streams = submit(engine, requests)
    wait_for(lambda: decoding(engine))
    hit(engine, "secondary0")
    wait_for(lambda: engine.recovery.recovering)
    hit(engine, "finisher")
    check(engine, streams, undisturbed, recoveries)


def test_an_idle_engine_brings_a_node_back_before_anybody_asks(engine: Engine) -> None:
    recoveries = engine.recovery.recoveries
    hit(engine, "secondary0")
    wait_for(lambda: engine.recovery.recoveries > recoveries)
    wait_for(lambda: {node.state for node in engine.nodes()} == {"ready"} and not engine.recovery.recovering)
