"""Spares take the places of nodes that are lost or told to end: real processes, real signals, every token compared."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from testing.links import call_node
from testing.manual_cluster import NODES, ManualCluster, on_loopback
from testing.waiting import wait_for

from mdi import Engine, SamplingParams
from mdi.checkpoint.manifest import chunk_file
from mdi.checkpoint.prepare import prepare
from mdi.checkpoint.source import open_source
from mdi.core.config import RecoveryLimits
from mdi.core.errors import LinkError
from mdi.engine import Completion, NodeStatus, Stream
from mdi.rpc.tls import Identity

REQUESTS = [
    (f"Prompt {number}: " + "many words, " * 40, SamplingParams(temperature=number % 2, seed=number, max_tokens=400))
    for number in range(3)
]
SPARES = ("spare0", "spare1")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("spares") / "tiny"
    shutil.copytree(tiny_checkpoint, path, ignore=shutil.ignore_patterns("chunks"))
    prepare(open_source(path), 3)
    return path


@pytest.fixture(scope="module")
def undisturbed(checkpoint: Path) -> list[tuple[int, ...]]:
    with Engine(checkpoint) as engine:
        return tokens([engine.submit(*request).completion() for request in REQUESTS])


@pytest.fixture
def undo() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def cluster(folder: Path, undo: ExitStack, *, n_spares: int = 1, encrypted: bool = False) -> ManualCluster:
    """Two nodes and some spares, none of them running."""
    places = on_loopback(*NODES, *(f"spare{index}" for index in range(n_spares)))
    return undo.enter_context(ManualCluster(folder, places, encrypted=encrypted))


def tokens(completions: Sequence[Completion]) -> list[tuple[int, ...]]:
    return [sample.token_ids for completion in completions for sample in completion.samples]


def engine_of(
    checkpoint: Path, nodes: ManualCluster, undo: ExitStack, *, spare_after_s: float = 0.5, **limits: float
) -> Engine:
    return undo.enter_context(
        Engine(
            checkpoint,
            nodes_config=nodes.config,
            wait_s=100,
            certs=nodes.certs("starter"),
            spare_after_s=spare_after_s,
            encryption=nodes.encrypted,
            recovery=replace(RecoveryLimits(recovery_timeout_s=100), **limits),  # type: ignore[arg-type]
        )
    )


def running(engine: Engine) -> list[Stream]:
    """Requests whose answers are being written."""
    streams = [engine.submit(*request) for request in REQUESTS]
    wait_for(lambda: min(stream.completion_tokens for stream in streams) > 20)
    return streams


def rest(streams: Sequence[Stream]) -> list[tuple[int, ...]]:
    return tokens([stream.completion() for stream in streams])


def shown(engine: Engine) -> list[tuple[str, str, str]]:
    return [(node.name, node.state, node.spare) for node in engine.nodes()]


def row(engine: Engine, name: str) -> NodeStatus:
    return next(node for node in engine.nodes() if node.name == name)


def test_spares_take_the_places_of_lost_nodes_and_streams_keep_their_tokens(
    checkpoint: Path, undisturbed: list[tuple[int, ...]], tmp_path: Path, undo: ExitStack
) -> None:
    """One node is lost, and then the other."""
    nodes = cluster(tmp_path, undo, n_spares=2, encrypted=True)
    processes = nodes.start_all()
    engine = engine_of(checkpoint, nodes, undo)
    wait_for(lambda: {(name, "waiting", name) for name in SPARES} <= set(shown(engine)))
    places = dict.fromkeys(NODES, "")
    for victim in NODES:
        streams = running(engine)
        processes[victim].popen.kill()
        assert rest(streams) == undisturbed
        spare = places[victim] = row(engine, victim).spare
        assert row(engine, victim).pid == processes[spare].popen.pid
        assert processes[spare].wait_for_line("receiving weights: done")
        assert list(nodes.cache(spare).glob(f"*/{chunk_file(victim)}"))
        stages = [("starter", "ready", ""), *((name, "ready", places[name]) for name in NODES)]
        assert shown(engine)[: len(stages)] == stages
    assert set(places.values()) == set(SPARES)
    assert engine.recovery.recoveries == 2
    assert engine.recovery.failed_requests == 0


def test_a_node_that_is_back_in_time_is_taken_and_gets_its_weights_again_on_a_fresh_disk(
    checkpoint: Path, undisturbed: list[tuple[int, ...]], tmp_path: Path, undo: ExitStack
) -> None:
    nodes = cluster(tmp_path, undo)
    processes = nodes.start_all()
    engine = engine_of(checkpoint, nodes, undo, spare_after_s=60)
    streams = running(engine)
    processes["finisher"].kill()
    shutil.rmtree(nodes.cache("finisher"))
    again = nodes.start("finisher")
    assert rest(streams) == undisturbed
    assert again.wait_for_line("receiving weights: done")
    assert ("finisher", "ready", "") in shown(engine)
    assert ("spare0", "waiting", "spare0") in shown(engine)


def test_places_change_hands_as_nodes_come_and_go(
    checkpoint: Path, undisturbed: list[tuple[int, ...]], tmp_path: Path, undo: ExitStack
) -> None:
    """Both nodes are lost at once, to two spares; one spare is lost, and the node is back at home."""
    nodes = cluster(tmp_path, undo, n_spares=2, encrypted=True)
    processes = nodes.start_all()
    engine = engine_of(checkpoint, nodes, undo)
    streams = running(engine)
    for name in NODES:
        processes[name].popen.kill()
    assert rest(streams) == undisturbed
    places = {name: row(engine, name).spare for name in NODES}
    assert set(places.values()) == {"spare0", "spare1"}
    streams = running(engine)
    processes[places["finisher"]].popen.kill()
    home = nodes.start("finisher")
    assert rest(streams) == undisturbed
    assert row(engine, "finisher").spare == ""
    wait_for(lambda: (places["finisher"], "lost", places["finisher"]) in shown(engine))
    streams = running(engine)
    home.popen.kill()
    nodes.start(places["finisher"])
    assert rest(streams) == undisturbed
    assert row(engine, "finisher").spare == places["finisher"]
    assert [node.restarts for node in engine.nodes()] == [0, 1, 3]


def test_a_starter_that_starts_again_finds_the_spare_in_the_place_it_took(
    checkpoint: Path, undisturbed: list[tuple[int, ...]], tmp_path: Path, undo: ExitStack
) -> None:
    nodes = cluster(tmp_path, undo)
    processes = nodes.start_all()
    with ExitStack() as first:
        engine = engine_of(checkpoint, nodes, first)
        streams = running(engine)
        processes["secondary0"].popen.kill()
        assert rest(streams) == undisturbed
    started = time.monotonic()
    engine = engine_of(checkpoint, nodes, undo)
    assert time.monotonic() - started < 60  # it waits 120 s for nodes
    assert rest(running(engine)) == undisturbed
    assert ("secondary0", "ready", "spare0") in shown(engine)


def test_a_node_told_to_end_hands_over_to_a_spare(
    checkpoint: Path, undisturbed: list[tuple[int, ...]], tmp_path: Path, undo: ExitStack
) -> None:
    nodes = cluster(tmp_path, undo, n_spares=2, encrypted=True)
    processes = nodes.start_all()
    engine = engine_of(checkpoint, nodes, undo, spare_after_s=1000)
    for victim in NODES:
        streams = running(engine)
        processes[victim].popen.terminate()
        wait_for(lambda name=victim: row(engine, name).state == "leaving")  # type: ignore[misc]
        assert processes[victim].wait_for_line(f"node {victim} hands over to a spare")
        assert processes[victim].popen.wait(25) == 0
        assert rest(streams) == undisturbed
    assert engine.recovery.failed_requests == 0
    assert {row(engine, name).spare for name in NODES} == set(SPARES)


def test_a_node_told_to_end_ends_when_no_spare_is_there(
    checkpoint: Path, undisturbed: list[tuple[int, ...]], tmp_path: Path, undo: ExitStack
) -> None:
    nodes = cluster(tmp_path, undo)
    processes = {name: nodes.start(name) for name in NODES}
    engine = engine_of(checkpoint, nodes, undo)
    streams = running(engine)
    told = time.monotonic()
    processes["finisher"].popen.terminate()
    assert processes["finisher"].popen.wait(25) == 0
    assert time.monotonic() - told < 15  # it waits 30 s at most
    nodes.start("finisher")
    assert rest(streams) == undisturbed
    engine.close()
    time.sleep(4)  # no starter asks any more
    processes["secondary0"].popen.terminate()
    assert processes["secondary0"].popen.wait(10) == 0


def test_told_twice_a_node_ends_at_once(checkpoint: Path, tmp_path: Path, undo: ExitStack) -> None:
    nodes = cluster(tmp_path, undo)
    processes = {name: nodes.start(name) for name in NODES}
    engine_of(checkpoint, nodes, undo)
    processes["finisher"].popen.send_signal(signal.SIGINT)
    processes["finisher"].wait_for_line("hands over")
    processes["finisher"].popen.send_signal(signal.SIGINT)
    assert processes["finisher"].popen.wait(10) == 0


def test_without_anybody_to_take_the_place_requests_fail_with_the_cause(
    checkpoint: Path, tmp_path: Path, undo: ExitStack
) -> None:
    nodes = cluster(tmp_path, undo)
    processes = {name: nodes.start(name) for name in NODES}
    engine = engine_of(checkpoint, nodes, undo, recovery_timeout_s=4)
    streams = running(engine)
    processes["finisher"].popen.kill()
    with pytest.raises(LinkError, match="finisher: nothing listens at"):
        streams[0].completion()
    assert engine.recovery.failed_requests == len(streams)


def test_only_the_node_before_may_send_batches_and_only_the_starter_weights(
    checkpoint: Path, tmp_path: Path, undo: ExitStack
) -> None:
    nodes = cluster(tmp_path, undo, encrypted=True)
    processes = nodes.start_all()
    engine = engine_of(checkpoint, nodes, undo)
    streams = running(engine)
    address = f"127.0.0.1:{nodes.places['finisher'].port}"
    for caller, method in (
        ("spare0", "Batches"),
        ("secondary0", "Offer"),
        ("spare0", "Weights"),
        ("spare0", "Release"),
    ):
        with pytest.raises(grpc.aio.AioRpcError, match="may not") as refused:
            call_node(address, "finisher", Identity.load(nodes.certs(caller), caller), method)
        assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert processes["finisher"].wait_for_line("only secondary0 may call Batches")
    assert len(rest(streams)) == len(streams)
    assert engine.recovery.recoveries == 0
