"""What a user is told who asks for Ray and has none, or not the one that was meant. No Ray cluster runs."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from mdi import Engine
from mdi.checkpoint.bundled import SHIPPED
from mdi.cli import values
from mdi.cluster.launchers import ray_cluster
from mdi.cluster.launchers.ray_cluster import RayCluster
from mdi.core.config import EngineConfig
from mdi.core.errors import ConfigError


@pytest.fixture(autouse=True)
def _no_ray_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real checks of addresses, before a Ray that is never asked for anything."""

    def init(**_: Any) -> None:
        raise AssertionError("Ray was asked to connect")

    fake = SimpleNamespace(is_initialized=lambda: False, init=init)
    monkeypatch.setattr(ray_cluster, "imported", lambda: fake)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture
def stranger() -> Iterator[str]:
    """The address of a gRPC server that is no Ray."""
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None)


@contextmanager
def listener() -> Iterator[tuple[socket.socket, str]]:
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield listening, f"127.0.0.1:{listening.getsockname()[1]}"


def answer(listening: socket.socket, greeting: bytes, connections: int) -> None:
    """Sends the greeting on each connection and closes it."""
    for _ in range(connections):
        connection, _ = listening.accept()
        with connection:
            connection.sendall(greeting)


class Healthy(grpc.GenericRpcHandler):  # type: ignore[misc]  # gRPC has no types
    """Answers health checks, as Ray's head does."""

    def service(self, call: Any) -> Any:
        return grpc.unary_unary_rpc_method_handler(lambda _, __: b"") if call.method == ray_cluster.HEALTH else None


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'mdi-llm\[cluster\]', on every machine"):
        Engine(SHIPPED, ray="auto", n_nodes=2)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("nonsense", "write auto, or host:port of its head"),
        ("10.0.0.1:0", "write auto, or host:port"),
        (":6379", "write auto, or host:port"),
        ("ray://10.0.0.1:10001", "address of Ray's client or dashboard: this command runs on a machine of the cluster"),
        ("http://10.0.0.1:8265", "ray job submit --address"),
    ],
)
def test_what_is_no_address_of_a_cluster(address: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        RayCluster.connect(address)


def test_an_address_where_nothing_listens_is_named_at_once() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match=rf"nothing answers at {address} .*: is Ray's head there"):
            RayCluster.connect(address)


def test_an_address_that_is_no_ray(stranger: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=rf"what answers at {stranger} is no head of a Ray cluster"):
        RayCluster.connect(stranger)
    monkeypatch.setenv("RAY_ADDRESS", stranger)  # as in a submitted job
    with pytest.raises(ConfigError, match=rf"what answers at {stranger} is no head of a Ray cluster"):
        RayCluster.connect("auto")


@pytest.mark.parametrize("greeting", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x15\x03\x03\x00\x02\x02\x46", b""])
def test_an_address_that_speaks_another_protocol(greeting: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "RETRY_S", 0)
    with listener() as (foreign, address), ThreadPoolExecutor(1) as pool:
        answered = pool.submit(answer, foreign, greeting, connections=3)
        with pytest.raises(ConfigError, match=r"is no head of a Ray cluster: .*RAY_USE_TLS"):
            RayCluster.connect(address)
        answered.result(5)


def test_a_silent_address_is_called_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "ANSWER_S", 0.3)
    with (
        listener() as (_, address),
        pytest.raises(ConfigError, match=r"was silent for 0\.3 s: .* machine overloaded\?"),
    ):
        RayCluster.connect(address)


def test_a_head_that_has_just_started_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    head = grpc.server(ThreadPoolExecutor(1), handlers=(Healthy(),))
    with listener() as (early, address), ThreadPoolExecutor(1) as pool:
        pool.submit(answer, early, b"", connections=2)

        def start(_: float) -> None:
            early.close()
            head.add_insecure_port(address)
            head.start()

        monkeypatch.setattr(ray_cluster, "time", SimpleNamespace(sleep=start))
        with pytest.raises(ConfigError, match="Ray was asked to connect"):
            RayCluster.connect(address)
    head.stop(None)


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("Could not find any running Ray instance. Please", "no Ray cluster runs on this machine: run `ray start"),
        ("Version mismatch: The cluster was started with: Ray: 2.41.0", "runs another version: use one version of Ray"),
        ("This node has an IP address of 10.0.0.9, and Ray expects this", "this machine is no part of the Ray cluster"),
        (
            "Failed to connect to Ray cluster at 10.0.0.1:6379",
            "does not let this command in: where it wants a token",
        ),
        ("out of luck", "cannot be used from here: out of luck"),
    ],
)
def test_what_ray_itself_refuses_is_passed_on_with_the_remedy(
    reason: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**_: Any) -> None:
        raise RuntimeError(reason)

    monkeypatch.setattr(ray_cluster.imported(), "init", init)
    with pytest.raises(ConfigError, match=said):
        RayCluster.connect("auto")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"ray": "auto", "nodes_config": Path("nodes.json")}, "--ray and --nodes-config exclude each other"),
        ({"ray_resources": {"CPU": 1}}, "name it with --ray"),
        ({"ray_labels": {"zone": "a"}}, "name it with --ray"),
        ({"ray": "auto", "ray_resources": {"CPU": -1.0}}, "CPU must be a number of at least 0"),
        ({"ray": "auto", "ray_resources": {"CPU": float("nan")}}, "CPU must be a number of at least 0"),
        ({"ray": "auto", "ray_strategy": "SPREAD_OUT"}, "ray_strategy must be one of STRICT_SPREAD, SPREAD"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        EngineConfig.of("bundled", **settings)


def test_resources_and_labels_of_the_command_line() -> None:
    assert values.amounts("CPU=8,memory=16e9", "--ray-resources") == {"CPU": 8, "memory": 16e9}
    assert values.amounts('{"GPU": 1}', "--ray-resources") == {"GPU": 1}
    assert values.pairs("zone=in(a, b),disk=!ssd", "--ray-labels") == {"zone": "in(a, b)", "disk": "!ssd"}
    assert values.amounts(None, "--ray-resources") is None


@pytest.mark.parametrize("text", ["CPU", "CPU=", "=1", "", "{", "CPU=many", "[1]", "{}"])
def test_other_texts_are_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match="--ray-resources is like"):
        values.amounts(text, "--ray-resources")


def test_ray_is_imported_by_nobody_who_did_not_ask_for_it() -> None:
    code = "import sys, mdi, mdi.cli.app, mdi.engine, mdi.cluster.cluster, mdi.node.server; print('ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.stdout == "False\n", done.stderr


def test_the_actor_knows_no_torch() -> None:
    """It starts in a Ray worker, where torch would take seconds."""
    code = "import sys, mdi.cluster.launchers.ray_actor; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.stdout == "False\n", done.stderr
