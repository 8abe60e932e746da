"""What the nodes of a pipeline have left for their KV caches, once they have loaded."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence

import psutil

from mdi.cluster.node_client import NodeAddress
from mdi.models.config import StageSpec
from mdi.models.parts import Parts
from mdi.models.weights import LoadedStage
from mdi.planning.cache import CacheNode
from mdi.planning.memory import free_bytes
from mdi.rpc import node_pb2
from mdi.rpc.channel import is_loopback

HERE = ""  # the starter's machine, among hosts


def cache_nodes(
    loaded: LoadedStage,
    stages: Sequence[StageSpec],
    nodes: Sequence[NodeAddress],
    statuses: Sequence[node_pb2.NodeStatus],
    limits_gb: Sequence[float | None],
) -> list[CacheNode]:
    """The starter, which has loaded its stage here, and the other nodes, in pipeline order.

    stages: of all nodes. statuses: of the other nodes, which have loaded. limits_gb: what each node may use, the starter first; empty where
    nothing is said. Nodes at one host share what is free there.
    """
    hosts = [HERE, *(_host(node) for node in nodes)]
    sharing = Counter(hosts)
    limits = limits_gb or [None] * len(hosts)
    states = [_starter_status(loaded), *statuses]
    return [
        CacheNode(
            name,
            len(stage.layers),
            min(status.free_bytes / sharing[host], _allowed_bytes(limit, status)),
            whole=not status.device.startswith("cpu"),
            n_kv_heads=Parts.of(loaded.config, stage, loaded.quantization).config.n_kv_heads,
        )
        for name, stage, host, limit, status in zip(
            ["starter", *(node.name for node in nodes)], stages, hosts, limits, states, strict=True
        )
    ]


def _host(node: NodeAddress) -> str:
    host = node.address.rpartition(":")[0]
    return HERE if is_loopback(host) else host


def _starter_status(loaded: LoadedStage) -> node_pb2.NodeStatus:
    return node_pb2.NodeStatus(
        device=str(loaded.device),
        free_bytes=free_bytes(loaded.device),
        resident_bytes=psutil.Process(os.getpid()).memory_info().rss,
    )


def _allowed_bytes(memory_gb: float | None, status: node_pb2.NodeStatus) -> float:
    """What a node is let use yet, besides all that is resident."""
    return math.inf if memory_gb is None else max(0.0, memory_gb * 1e9 - status.resident_bytes)
