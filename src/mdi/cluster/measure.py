"""What the machines of a nodes-config can do, so that the plan gives each what it can carry. Asks; starts nothing."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mdi.checkpoint.cache import default_cache_folder
from mdi.cluster.launchers.manual import ManualLauncher, Waiting
from mdi.cluster.link import NodeAddress
from mdi.cluster.node_client import Visitor
from mdi.cluster.nodes_config import NodeConfig, NodesConfig
from mdi.core.config import ManualNodes
from mdi.core.errors import LinkError
from mdi.planning.hardware import Machine, measure_hardware
from mdi.rpc.tls import Identity

PROCESS_BYTES = 0.3e9  # of `memory_gb`: what a node takes before it has a weight


@dataclass(frozen=True)
class MeasuredNode:
    """A node's machine as far as it is known. unknown: why it could not be asked; empty when it could."""

    machine: Machine
    unknown: str = ""


def measure_all(
    config: NodesConfig,
    manual: ManualNodes,
    identity: Identity | None,
    dtype: str,
    device: str,
    waiting: Waiting | None = None,
) -> list[Machine]:
    """All machines, the starter's first; waits for nodes as the start of a cluster does.

    dtype, device: what the starter computes with. Raises LinkError when nodes are missing, or cannot be measured.
    """
    awaited = ManualLauncher(config, manual, identity, waiting=waiting)
    try:
        findings = _ask_all(config, identity, awaited.nodes, dtype, device)
    finally:
        awaited.close()
    for finding, node in zip(findings[1:], awaited.nodes, strict=True):
        if finding.unknown:
            raise LinkError(f"node {node.name} could not be measured: {finding.unknown}", node.name)
    return [finding.machine for finding in findings]


def measure_reachable(config: NodesConfig, identity: Identity | None, dtype: str, device: str) -> list[MeasuredNode]:
    """The same for who is there just now; who is not is taken to be as fast as this machine."""
    nodes = [NodeAddress(node.name, node.address) for node in config.pipeline]
    return _ask_all(config, identity, nodes, dtype, device)


def _ask_all(
    config: NodesConfig, identity: Identity | None, nodes: Sequence[NodeAddress], dtype: str, device: str
) -> list[MeasuredNode]:
    """One after the other: two on one machine would slow each other down."""
    visitor = Visitor(identity, None, None)
    here = measure_hardware(device, dtype, default_cache_folder())
    findings = [MeasuredNode(_limited(here, config.starter))]
    for node, described in zip(nodes, config.pipeline, strict=True):
        found = asyncio.run(visitor.probe(node, dtype))
        if isinstance(found, str):
            findings.append(MeasuredNode(_limited(replace(here, memory_bytes=math.inf), described), found))
        else:
            findings.append(MeasuredNode(_limited(found, described)))
    return findings


def _limited(machine: Machine, node: NodeConfig) -> Machine:
    """What the nodes-config allows of it."""
    allowed = math.inf if node.memory_gb is None else max(0.0, node.memory_gb * 1e9 - PROCESS_BYTES)
    return replace(machine, memory_bytes=min(machine.memory_bytes, allowed))
