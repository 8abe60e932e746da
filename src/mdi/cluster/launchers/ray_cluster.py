"""The connection to a Ray cluster, as its driver. The only module that imports Ray, beside the launcher."""

from __future__ import annotations

import importlib
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import grpc

from mdi.cluster.launchers.ray_bundles import RayMachine
from mdi.core.errors import ConfigError

AUTO = "auto"
ADDRESS_VARIABLE = "RAY_ADDRESS"
CONNECT_S = 5.0
ANSWER_S = 30.0  # the head of a busy machine may take long
RETRY_S = 1.0
HEALTH = "/grpc.health.v1.Health/Check"  # what `ray health-check` asks
JOIN = "run `ray start --address=HOST:6379` on this machine, or submit the command: ray job submit -- mdi serve ..."


@dataclass(frozen=True)
class RayCluster:
    """A cluster that this process has joined as a driver. here: the id of its machine.

    own: the connection was made here, and is closed with this object.
    """

    here: str
    own: bool

    @classmethod
    def connect(cls, address: str) -> RayCluster:
        """address: auto, or host:port of the head. Raises ConfigError, with the remedy, where that is no cluster."""
        ray = imported()
        if own := not ray.is_initialized():
            where = os.environ.get(ADDRESS_VARIABLE, AUTO) if address == AUTO else address
            if where not in (AUTO, "local", ""):
                _check_address(where)
            _init(ray, where or AUTO)
        return cls(ray.get_runtime_context().get_node_id(), own)

    def machines(self) -> Sequence[RayMachine]:
        """Those that are part of the cluster now."""
        from ray._private.state import available_resources_per_node

        free = available_resources_per_node()
        return [
            RayMachine(
                node["NodeID"],
                _name(node, self.here),
                node["Resources"],
                free.get(node["NodeID"], {}),
                node.get("Labels", {}),
            )
            for node in imported().nodes()
            if node["Alive"]
        ]

    def close(self) -> None:
        """Leaves the cluster, which ends what was placed. Safe to call twice."""
        if self.own:
            imported().shutdown()


def imported() -> ModuleType:
    """Ray itself. Raises ConfigError when it is not installed."""
    try:
        return importlib.import_module("ray")
    except ImportError:
        raise ConfigError("Ray is not installed here: pip install 'mdi-llm[cluster]', on every machine") from None


def _init(ray: ModuleType, address: str) -> None:
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", configure_logging=False)
    except Exception as error:
        raise ConfigError(_refusal(address, " ".join(str(error).split()))) from None


def _refusal(address: str, reason: str) -> str:
    """What Ray's error says, in a sentence with the remedy."""
    shown = "the Ray cluster" if address == AUTO else f"the Ray cluster at {address}"
    lower = reason.lower()
    if "version mismatch" in lower:
        return f"{shown} runs another version: use one version of Ray and Python on all machines. Ray says: {reason}"
    if "could not find any running ray" in lower:
        return f"no Ray cluster runs on this machine: {JOIN}"
    if "raylet" in lower or "node_ip" in lower or "ip address" in lower:
        return f"this machine is no part of {shown}: {JOIN}"
    if "failed to connect" in lower or "authtoken" in lower:
        wanted = "where it wants a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN here, too"
        return f"{shown} does not let this command in: {wanted}. Ray says: {reason[:400]}"
    return f"{shown} cannot be used from here: {reason[:400]}"


def _check_address(address: str) -> None:
    """Raises ConfigError where no Ray cluster answers: Ray itself would try for two minutes, and end this process."""
    if "://" in address:
        raise ConfigError(
            f"--ray {address} is the address of Ray's client or dashboard: this command runs on a machine of the "
            "cluster, with --ray auto; `ray job submit --address ... -- mdi serve ... --ray auto` takes it there"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(f"--ray {address} is no address of a Ray cluster: write auto, or host:port of its head")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except OSError as error:
        raise ConfigError(
            f"nothing answers at {address} ({error.strerror or error}): is Ray's head there (ray start --head), and "
            "its port open?"
        ) from None
    if os.environ.get("RAY_USE_TLS", "0") != "1":
        _check_health(address)


def _check_health(address: str) -> None:
    """Raises ConfigError where another protocol than Ray's answers, or nothing within ANSWER_S."""
    status = _health(address)
    if status is grpc.StatusCode.UNAVAILABLE:  # another protocol, or a head that was just about to listen
        time.sleep(RETRY_S)
        status = _health(address)
    if status is grpc.StatusCode.DEADLINE_EXCEEDED:
        raise ConfigError(
            f"what listens at {address} was silent for {ANSWER_S:g} s: is it the head of a Ray cluster (its port is "
            "6379 unless set), and is its machine overloaded?"
        )
    if status in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNIMPLEMENTED):
        raise ConfigError(
            f"what answers at {address} is no head of a Ray cluster: its port is 6379 unless set; one with "
            "RAY_USE_TLS=1 wants that here, too"
        )


def _health(address: str) -> grpc.StatusCode:
    """How the health check ends. A silent peer gives DEADLINE_EXCEEDED; gRPC itself would give up on it after 20 s."""
    patience = ("grpc.min_reconnect_backoff_ms", int(2 * ANSWER_S * 1000))
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0), patience]) as channel:
        try:
            channel.unary_unary(HEALTH)(b"", timeout=ANSWER_S)
        except grpc.RpcError as error:
            return error.code()
    return grpc.StatusCode.OK


def _name(node: dict[str, object], here: str) -> str:
    return f"{node['NodeName']}{' (this machine)' if node['NodeID'] == here else ''}"
