"""Waiting for nodes that somebody else starts: in any order, with what keeps each away, and no longer than told."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from testing.links import fake_node, free_port

from mdi.cluster.launchers.manual import ManualLauncher, Presence, Waiting, starter_identity
from mdi.cluster.monitor import Monitor
from mdi.cluster.nodes_config import NodesConfig
from mdi.core.config import ManualNodes
from mdi.core.errors import ConfigError, LinkError
from mdi.rpc.authority import Authority, create_authority, create_node
from mdi.rpc.tls import Identity

Launch = Callable[..., ManualLauncher]


def config_of(*ports: int, addr: str = "127.0.0.1", **more: Any) -> NodesConfig:
    nodes = [{"addr": addr, "communication": {"port": port}} for port in ports]
    starter = {"addr": "127.0.0.1", "communication": {"port": 1}}
    return NodesConfig.parse(json.dumps({"nodes": {"starter": starter, "secondary": nodes, **more}}).encode())


def notes(shown: list[Sequence[Presence]], name: str) -> list[str]:
    """What was said of a node, without repetitions."""
    said = [presence.note for moment in shown for presence in moment if presence.node.name == name]
    return list(dict.fromkeys(said))


@pytest.fixture
def launch() -> Iterator[Launch]:
    """Starts launchers, and closes them in the end."""
    with ExitStack() as undo:

        def start(
            config: NodesConfig, manual: ManualNodes, identity: Identity | None, waiting: Waiting | None = None
        ) -> ManualLauncher:
            monitor = Monitor(identity)
            undo.callback(monitor.close)
            launcher = ManualLauncher(config, manual, monitor, waiting=waiting)
            undo.callback(launcher.close)
            launcher.start()
            return launcher

        yield start


def test_nodes_are_found_in_any_order_and_shown_as_they_come(launch: Launch) -> None:
    first, last = free_port(), free_port()
    shown: list[Sequence[Presence]] = []
    finisher_seen, secondary_missed = threading.Event(), threading.Event()

    def watch(present: Sequence[Presence]) -> None:
        shown.append(present)
        secondary, finisher = present
        if "nothing listens" in secondary.note:
            secondary_missed.set()
        if finisher.there:
            finisher_seen.set()

    with ExitStack() as servers:
        servers.enter_context(fake_node(None, "finisher", last))

        def come_late() -> None:
            assert finisher_seen.wait(30)
            assert secondary_missed.wait(30)
            servers.enter_context(fake_node(None, "secondary0", first))

        latecomer = threading.Thread(target=come_late)
        latecomer.start()
        nodes = launch(config_of(first, last), ManualNodes(wait_s=60), None, waiting=watch)
        latecomer.join()
        assert [node.name for node in nodes.nodes] == ["secondary0", "finisher"]
        assert all(presence.there for presence in shown[-1])
        assert notes(shown, "secondary0")[-2:] == [
            f"nothing listens at 127.0.0.1:{first}: start the node there",
            "loaded",
        ]


def test_the_wait_ends_in_time_and_names_who_is_missing_and_why(launch: Launch) -> None:
    here, nowhere = free_port(), free_port()
    started = time.monotonic()
    with fake_node(None, "secondary0", here), pytest.raises(LinkError) as error:
        launch(config_of(here, nowhere), ManualNodes(wait_s=0.5), None)
    assert time.monotonic() - started < 10
    expected = (
        f"not all nodes were there within 0.5 s. finisher: nothing listens at 127.0.0.1:{nowhere}: start the node"
    )
    assert str(error.value).startswith(expected)
    assert error.value.node == "finisher"


def test_a_node_with_anothers_chunk_is_not_taken(launch: Launch) -> None:
    with fake_node(None, "finisher") as address, pytest.raises(LinkError, match="is finisher: start each node with"):
        launch(config_of(int(address.split(":")[1]), free_port()), ManualNodes(wait_s=1), None)


def test_an_encrypted_node_is_found_with_the_starters_certificate_alone(launch: Launch, tmp_path: Path) -> None:
    create_authority(tmp_path)
    for name in ("starter", "vision"):
        create_node(tmp_path, name)
    with fake_node(Authority.load(tmp_path).issue("finisher"), "finisher") as address:
        config, manual = config_of(int(address.split(":")[1])), ManualNodes(wait_s=1, certs=tmp_path)
        launch(config, manual, starter_identity(config, manual, encryption=True))
        with pytest.raises(LinkError, match="set ENABLE_ENCRYPTION=1"):
            launch(config, manual, starter_identity(config, manual, encryption=False))
        (tmp_path / "starter.pem").write_bytes((tmp_path / "vision.pem").read_bytes())
        (tmp_path / "starter.key").write_bytes((tmp_path / "vision.key").read_bytes())
        with pytest.raises(ConfigError, match="is of vision, not of starter"):
            starter_identity(config, manual, encryption=True)


def test_a_node_that_was_lost_is_awaited_again(launch: Launch) -> None:
    port = free_port()
    with ExitStack() as servers:
        with fake_node(None, "finisher", port):
            nodes = launch(config_of(port), ManualNodes(wait_s=30), None)
        with pytest.raises(LinkError, match=r"within 0\.3 s\. finisher: nothing listens"):
            nodes.restart(["finisher"], 0.3)
        again = threading.Timer(1, lambda: servers.enter_context(fake_node(None, "finisher", port)))
        again.start()
        nodes.restart(["finisher"], 30)
        assert nodes.dead() == set()
        again.join()


def test_a_spare_is_taken_with_its_own_certificate_alone(launch: Launch, tmp_path: Path) -> None:
    authority = create_authority(tmp_path)
    create_node(tmp_path, "starter")
    port, spare_port = free_port(), free_port()
    spare = {"addr": "127.0.0.1", "communication": {"port": spare_port}}
    config = config_of(port, spare=[spare])
    manual = ManualNodes(wait_s=30, certs=tmp_path, spare_after_s=0)
    identity = starter_identity(config, manual, encryption=True)
    with fake_node(authority.issue("finisher"), "finisher", port):
        nodes = launch(config, manual, identity)
    for impostor, name in (("spare1", "spare0"), ("finisher", "spare0"), ("spare0", "spare1")):
        with fake_node(authority.issue(impostor), name, spare_port), pytest.raises(LinkError, match="nothing list"):
            nodes.restart(["finisher"], 1.5)
    with fake_node(authority.issue("spare0"), "spare0", spare_port):
        nodes.restart(["finisher"], 30)
    taken = [(node.name, node.id, node.address) for node in nodes.nodes]
    assert taken == [("finisher", "spare0", f"127.0.0.1:{spare_port}")]


def test_the_last_node_without_a_finisher_has_either_name_in_its_certificate(launch: Launch, tmp_path: Path) -> None:
    authority = create_authority(tmp_path)
    create_node(tmp_path, "starter")
    port = free_port()
    config, manual = config_of(port), ManualNodes(wait_s=30, certs=tmp_path)
    with fake_node(authority.issue("secondary0"), "secondary0", port):
        nodes = launch(config, manual, starter_identity(config, manual, encryption=True))
        assert [(node.name, node.id) for node in nodes.nodes] == [("finisher", "secondary0")]
    with fake_node(authority.issue("finisher"), "finisher", port):
        nodes.restart(["finisher"], 30)
        assert [(node.name, node.id) for node in nodes.nodes] == [("finisher", "finisher")]
    for impostor in ("secondary1", "spare0"):
        with fake_node(authority.issue(impostor), "finisher", port), pytest.raises(LinkError, match=f"of {impostor}"):
            nodes.restart(["finisher"], 1.5)
    finisher = {"addr": "127.0.0.1", "communication": {"port": port}}
    config = config_of(finisher=finisher)
    with fake_node(authority.issue("secondary0"), "secondary0", port), pytest.raises(LinkError, match="of secondary0"):
        launch(config, ManualNodes(wait_s=1.5, certs=tmp_path), starter_identity(config, manual, encryption=True))


def test_closing_ends_the_wait(launch: Launch) -> None:
    port = free_port()
    with fake_node(None, "finisher", port):
        nodes = launch(config_of(port), ManualNodes(wait_s=30), None)
    threading.Timer(0.5, nodes.close).start()
    started = time.monotonic()
    with pytest.raises(LinkError, match="not waited for any more"):
        nodes.restart(["finisher"], 60)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("wait_s", [0, -1, float("nan")])
def test_a_wait_of_no_length_is_refused(wait_s: float) -> None:
    with pytest.raises(ConfigError, match="wait_s must be above 0"):
        ManualNodes(wait_s=wait_s)


def test_nodes_on_other_machines_need_encryption_or_leave() -> None:
    config = config_of(5000, addr="10.11.12.13")
    with pytest.raises(ConfigError, match=r"nodes\.secondary\[0\] is on another machine.*ENABLE_ENCRYPTION=1"):
        starter_identity(config, ManualNodes(), encryption=False)
    spare = {"addr": "10.11.12.14", "communication": {"port": 5001}}
    with pytest.raises(ConfigError, match=r"nodes\.spare\[0\] is on another machine"):
        starter_identity(config_of(5000, spare=[spare]), ManualNodes(), encryption=False)
    assert starter_identity(config, ManualNodes(insecure=True), encryption=False) is None
    assert starter_identity(config_of(5000), ManualNodes(), encryption=False) is None
