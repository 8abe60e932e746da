"""Heartbeats: one poll a second for all who need it, and the reason for a missed one only when somebody needs it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import pytest
from testing.links import fake_node, free_port

from mdi.cluster import node_client
from mdi.cluster.monitor import Beat, Heartbeat, Monitor, warn_of_other_kernels
from mdi.cluster.node_client import NodeAddress
from mdi.core.errors import LinkError
from mdi.kernels.library import kernels_in_use
from mdi.rpc import node_pb2
from mdi.rpc.authority import Authority
from mdi.rpc.channel import HEARTBEAT_S
from mdi.rpc.diagnose import diagnose
from mdi.rpc.tls import Identity


@pytest.fixture
def diagnoses(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The addresses that were diagnosed, in order; the diagnosis itself is the real one."""
    addresses: list[str] = []

    def counted(address: str, peer: str, identity: Identity | None) -> str | None:
        addresses.append(address)
        return diagnose(address, peer, identity)

    monkeypatch.setattr(node_client, "diagnose", counted)
    return addresses


@pytest.fixture(params=["plain", "encrypted"])
def authority(request: pytest.FixtureRequest) -> Authority | None:
    return Authority.create() if request.param == "encrypted" else None


@pytest.fixture
def monitor(authority: Authority | None) -> Iterator[Monitor]:
    with closing(Monitor(authority.issue("starter") if authority else None)) as monitor:
        yield monitor


def watch(monitor: Monitor, address: str, name: str = "finisher") -> Heartbeat:
    return monitor.loop.call(monitor.watch(NodeAddress(name, address)))


def next_beat(monitor: Monitor, heartbeat: Heartbeat) -> Beat:
    return monitor.loop.call(heartbeat.next())


def test_a_healthy_node_is_polled_every_second_without_a_diagnosis(
    monitor: Monitor, authority: Authority | None, diagnoses: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[Path] = []
    monkeypatch.setattr(Identity, "save", lambda _identity, folder: saved.append(folder))
    with fake_node(authority.issue("finisher") if authority else None) as address:
        heartbeat = watch(monitor, address)
        beats = [next_beat(monitor, heartbeat) for _ in range(3)]
        monitor.loop.call(heartbeat.answer())
    assert all(beat.answer and beat.answer.node == "finisher" for beat in beats)
    between = [after.asked_s - before.asked_s for before, after in pairwise(beats)]
    assert min(between) > 0.9 * HEARTBEAT_S
    assert heartbeat.shown("finisher").state == "loaded"
    assert diagnoses == []
    assert saved == []  # no private key on disk


def test_the_reason_is_found_when_a_node_is_down(monitor: Monitor, diagnoses: list[str]) -> None:
    address = f"127.0.0.1:{free_port()}"
    heartbeat = watch(monitor, address)
    assert next_beat(monitor, heartbeat).error
    assert diagnoses == []
    with pytest.raises(LinkError, match=f"nothing listens at {address}: start the node there"):
        monitor.loop.call(heartbeat.answer())
    assert diagnoses == [address]


def test_a_node_is_lost_after_three_missed_beats_and_found_again(
    monitor: Monitor, authority: Authority | None, diagnoses: list[str]
) -> None:
    identity, port = authority.issue("finisher") if authority else None, free_port()
    with fake_node(identity, "finisher", port) as address:
        heartbeat = watch(monitor, address)
        assert next_beat(monitor, heartbeat).missed == 0
    before = time.monotonic()
    beats = [next_beat(monitor, heartbeat)]
    while not beats[-1].lost:
        beats.append(next_beat(monitor, heartbeat))
    assert time.monotonic() - before > 2 * HEARTBEAT_S
    assert [beat.missed for beat in beats][-3:] == [1, 2, 3]
    assert heartbeat.shown("finisher").state == "lost"
    with fake_node(identity, "finisher", port):
        while not (beat := next_beat(monitor, heartbeat)).answer:
            assert time.monotonic() - before < 30
        assert beat.missed == 0
        assert heartbeat.shown("finisher").state == "loaded"
    assert diagnoses == []


def test_another_node_at_the_address_is_no_answer(monitor: Monitor, authority: Authority | None) -> None:
    with fake_node(authority.issue("secondary0") if authority else None, "secondary0") as address:
        heartbeat = watch(monitor, address)
        expected = "has the certificate of secondary0" if authority else "is secondary0: start each node with its own"
        with pytest.raises(LinkError, match=expected):
            monitor.loop.call(heartbeat.answer())
        assert heartbeat.last
        assert heartbeat.last.answer is None


def test_one_heartbeat_a_node_which_follows_it_to_another_address(
    monitor: Monitor, authority: Authority | None
) -> None:
    identity = authority.issue("finisher") if authority else None
    with fake_node(identity) as first, fake_node(identity) as second:
        heartbeat = watch(monitor, first)
        assert watch(monitor, first) is heartbeat
        moved = watch(monitor, second)
        assert moved is not heartbeat
        assert monitor.heartbeat(NodeAddress("finisher", second)) is moved
        assert next_beat(monitor, moved).answer


def test_a_node_that_computes_with_other_kernels_is_named(caplog: pytest.LogCaptureFixture) -> None:
    here = kernels_in_use("cpu")
    for device, kernels in [("cpu", here), ("cuda:0", "torch"), ("cpu", "")]:
        warn_of_other_kernels("secondary0", node_pb2.NodeStatus(device=device, kernels=kernels))
    assert not caplog.records
    warn_of_other_kernels("finisher", node_pb2.NodeStatus(device="cpu", kernels="abacus"))
    assert f"node finisher computes with abacus, this machine with {here}: an answer" in caplog.text
