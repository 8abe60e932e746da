"""Nodes that somebody starts on other machines: awaited, in whatever order they come. Starts and ends none of them."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

from mdi.cluster.launcher import Died
from mdi.cluster.nodes import NodesConfig
from mdi.errors import ConfigError, LinkError
from mdi.pipeline import wire, wire_pb2
from mdi.pipeline.grpc_link import NodeAddress
from mdi.pipeline.node import is_loopback
from mdi.pipeline.reach import why_unreachable
from mdi.pipeline.tls import VARIABLE, Identity, open_channel

POLL_S = 1.0
RPC_TIMEOUT_S = 2.0


@dataclass(frozen=True)
class Presence:
    """Whether a node is there, as last seen. note: what it does, or why it cannot be reached; empty before that."""

    node: NodeAddress
    there: bool
    note: str


Waiting = Callable[[Sequence[Presence]], None]
"""Told of all awaited nodes, whenever something about one changed."""


@dataclass(frozen=True)
class ByHand:
    """Nodes started by hand, and how to wait for them. Raises ConfigError for what cannot be served that way.

    wait_s: longest wait at the start. certs: folder of the starter's certificate, for encrypted links.
    insecure: they may be on other machines although links are not encrypted. waiting: shown who is there.
    """

    config: NodesConfig
    wait_s: float = 600.0
    certs: Path = Path("certs")
    insecure: bool = False
    waiting: Waiting | None = None

    def __post_init__(self) -> None:
        for node in (self.config.vision, *self.config.spares):
            if node:
                raise ConfigError(f"{node.key} is not supported yet: leave it out of the nodes-config")
        if not self.wait_s > 0:
            raise ConfigError(f"nodes are waited for longer than 0 s, not {self.wait_s:g}")

    def identity(self, encryption: bool) -> Identity | None:
        """The starter's, when links are encrypted. Raises ConfigError when they are not and would have to be."""
        if encryption:
            return Identity.load(self.certs, "starter")
        for node in self.config.pipeline:
            if not self.insecure and not is_loopback(node.addr):
                raise ConfigError(
                    f"{node.key} is on another machine ({node.addr}), and links are not encrypted: "
                    f"set {VARIABLE}=1 (see `mdi certs --help`), or allow it with --insecure"
                )
        return None


class AwaitedNodes:
    """A `Launcher` for nodes started by hand: made, or back after a loss, when all answer.

    Raises LinkError, with what is wrong with each, when some do not answer in time.
    """

    def __init__(self, by_hand: ByHand, identity: Identity | None) -> None:
        self._nodes = [NodeAddress(node.name, node.address) for node in by_hand.config.pipeline]
        self._identity = identity
        self._waiting = by_hand.waiting
        self._closed = threading.Event()
        self._restarts: Counter[str] = Counter()
        self._wait(self._nodes, by_hand.wait_s)

    @property
    def nodes(self) -> list[NodeAddress]:
        return self._nodes

    def watch(self, died: Died) -> None:
        """Does nothing: the links notice."""

    def dead(self) -> set[str]:
        return set()

    def restart(self, names: Collection[str], timeout_s: float) -> None:
        """Waits until somebody has started these nodes anew, or the network reaches them again."""
        self._restarts.update(names)
        self._wait([node for node in self._nodes if node.name in names], timeout_s)

    def restarts(self, name: str) -> int:
        return self._restarts[name]

    def close(self) -> None:
        """Ends a wait. The nodes stay, for the next who serves with them."""
        self._closed.set()

    def _wait(self, nodes: Sequence[NodeAddress], timeout_s: float) -> None:
        found = {node.name: Presence(node, False, "") for node in nodes}
        asyncio.run(self._find_all(found, timeout_s))
        missing = [presence for presence in found.values() if not presence.there]
        if self._closed.is_set():
            raise LinkError("nodes are not waited for any more")
        if missing:
            each = "; ".join(f"{presence.node.name}: {presence.note}" for presence in missing)
            raise LinkError(f"not all nodes were there within {timeout_s:g} s. {each}", missing[0].node.name)

    async def _find_all(self, found: dict[str, Presence], timeout_s: float) -> None:
        searches = [asyncio.create_task(self._find(name, found)) for name in found]
        await asyncio.wait(searches, timeout=timeout_s)
        for search in searches:
            search.cancel()
        for outcome in await asyncio.gather(*searches, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome

    async def _find(self, name: str, found: dict[str, Presence]) -> None:
        while not found[name].there and not self._closed.is_set():
            presence = await self._look(found[name].node)
            if presence != found[name]:
                found[name] = presence
                if self._waiting:
                    self._waiting(list(found.values()))
            if not presence.there:
                await asyncio.sleep(POLL_S)

    async def _look(self, node: NodeAddress) -> Presence:
        reason = await asyncio.to_thread(why_unreachable, node.address, node.name, self._identity)
        if reason:
            return Presence(node, False, reason)
        channel = open_channel(node.address, node.name, self._identity, wire.CHANNEL_OPTIONS)
        ask = channel.unary_unary(
            wire.method("Status"),
            request_serializer=wire.serialize,
            response_deserializer=lambda data: wire.parse(wire_pb2.NodeStatus, data),
        )
        try:
            status = await ask(wire_pb2.StatusRequest(), timeout=RPC_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            return Presence(node, False, f"{node.address} does not answer ({error.details()})")
        finally:
            await channel.close()
        if status.name != node.name:
            return Presence(node, False, f"at {node.address} is {status.name}: start each node with its own --chunk")
        return Presence(node, True, "loaded" if status.state == wire_pb2.NodeStatus.LOADED else "loading")
