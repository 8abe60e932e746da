"""Measures the machines of a nodes-config, so that the plan gives each what it can carry. Starts nothing."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from itertools import combinations

from mdi.checkpoint.cache import default_cache_folder
from mdi.cluster.launchers.manual import ManualLauncher, Waiting, addresses
from mdi.cluster.monitor import Monitor
from mdi.cluster.node_client import NodeAddress, NodeClient
from mdi.cluster.nodes_config import NodeConfig, NodesConfig
from mdi.core.config import ManualNodes
from mdi.core.errors import LinkError
from mdi.core.quantization import ModelQuantization
from mdi.planning.choose import Links
from mdi.planning.hardware import LinkSpeed, Machine, measure_hardware
from mdi.rpc.measure_link import measure_link as measure_own_link
from mdi.rpc.tls import Identity

log = logging.getLogger(__name__)

PROCESS_BYTES = 0.3e9  # of `memory_gb`: what a node takes before it has a weight


@dataclass(frozen=True)
class MeasuredNode:
    """A node's machine as far as it is known. unknown: why it could not be measured; empty when it was."""

    machine: Machine
    unknown: str = ""


def measure_all(
    config: NodesConfig,
    manual: ManualNodes,
    monitor: Monitor,
    dtype: str,
    quantization: ModelQuantization,
    device: str,
    waiting: Waiting | None = None,
) -> tuple[list[Machine], Links]:
    """All machines, the starter's first, and their links; waits for nodes as the start of a cluster does.

    dtype, quantization, device: what the starter computes with. Raises LinkError when nodes are missing, or cannot be
    measured.
    """
    launcher = ManualLauncher(config, manual, monitor, waiting=waiting)
    try:
        launcher.start()
    finally:
        launcher.close()
    measured = _measure(config, monitor.identity, [[node] for node in launcher.nodes], dtype, quantization, device)
    for one, node in zip(measured[1:], launcher.nodes, strict=True):
        if one.unknown:
            raise LinkError(f"node {node.name} could not be measured: {one.unknown}", node.name)
    return [one.machine for one in measured], asyncio.run(_measure_links(launcher.nodes, monitor.identity))


def measure_reachable(
    config: NodesConfig, identity: Identity | None, dtype: str, quantization: ModelQuantization, device: str
) -> tuple[list[MeasuredNode], Links]:
    """The same for nodes that run now; one that does not is taken to be as fast as this machine."""
    nodes = [addresses(node, identity) for node in config.pipeline]
    measured = _measure(config, identity, nodes, dtype, quantization, device)
    return measured, asyncio.run(_measure_links([names[0] for names in nodes], identity))


def _measure(
    config: NodesConfig,
    identity: Identity | None,
    nodes: Sequence[Sequence[NodeAddress]],
    dtype: str,
    quantization: ModelQuantization,
    device: str,
) -> list[MeasuredNode]:
    """One after the other: two on one machine would slow each other down. With weights as the layers have them.

    nodes: each under every name that it may have.
    """
    here = measure_hardware(device, dtype, default_cache_folder(), quantization.layers)
    measured = [MeasuredNode(_limited(here, config.starter))]
    for names, described in zip(nodes, config.pipeline, strict=True):
        for node in names:
            try:
                machine, unknown = asyncio.run(_measure_node(node, identity, dtype, quantization.layers)), ""
                break
            except LinkError as error:
                machine, unknown = replace(here, memory_bytes=math.inf), str(error)
        measured.append(MeasuredNode(_limited(machine, described), unknown))
    return measured


async def _measure_links(nodes: Sequence[NodeAddress], identity: Identity | None) -> Links:
    """Of every pair of nodes, one after the other; those that do not answer are left out. nodes: after the starter."""
    known = dict[tuple[int, int], LinkSpeed]()
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(NodeClient(node, identity)) for node in nodes]
        for (one, first), (other, second) in combinations(enumerate([None, *clients]), 2):
            assert second  # only the first of all is the starter
            try:
                known[one, other] = await measure_link(first, second, identity)
            except LinkError as error:
                log.warning("the link between nodes %d and %d is not measured: %s", one, other, error)
    return Links(known)


async def measure_link(one: NodeClient | None, other: NodeClient, identity: Identity | None) -> LinkSpeed:
    """The link between two nodes; one: None for the starter, which this process is. Raises LinkError.

    identity: the starter's.
    """
    own = one.node.id if one else "starter"
    listening = await other.listen(own)
    if one:
        return await one.measure_link(listening)
    return await asyncio.to_thread(measure_own_link, own, listening, identity)


async def _measure_node(node: NodeAddress, identity: Identity | None, dtype: str, quantization: str | None) -> Machine:
    async with NodeClient(node, identity) as client:
        return await client.measure_hardware(dtype, quantization)


def _limited(machine: Machine, node: NodeConfig) -> Machine:
    """What the nodes-config allows of it."""
    allowed = math.inf if node.memory_gb is None else max(0.0, node.memory_gb * 1e9 - PROCESS_BYTES)
    return replace(machine, memory_bytes=min(machine.memory_bytes, allowed))
