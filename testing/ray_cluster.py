"""A Ray cluster for tests: machines that are processes on this one, and have its address."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
from ray.cluster_utils import Cluster

OBJECT_STORE_BYTES = 80 * 2**20  # the least that Ray takes; nothing of ours goes through it

CACHE = "XDG_CACHE_HOME"


@contextmanager
def ray_cluster(n_machines: int, *, cpus: int, dashboard: bool = False) -> Iterator[Cluster]:
    """A head without CPUs, where drivers run, and so many machines for nodes."""
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 0,
            "include_dashboard": dashboard,
            "dashboard_agent_listen_port": 0,  # any: another test's cluster may have the usual one
            "object_store_memory": OBJECT_STORE_BYTES,
        },
    )
    try:
        for _ in range(n_machines):
            cluster.add_node(wait=False, num_cpus=cpus, object_store_memory=OBJECT_STORE_BYTES)
        cluster.wait_for_nodes()
        yield cluster
    finally:
        cluster.shutdown()


def placed_nodes(role: str = "") -> list[psutil.Process]:
    """Processes of nodes that Ray started, of one role or of all; by their cache, those of this process's cluster."""
    found = list[psutil.Process]()
    for process in psutil.process_iter(["cmdline", "status", "environ"]):
        words: list[str] = process.info["cmdline"] or []
        ours = (process.info["environ"] or {}).get(CACHE) == os.environ.get(CACHE)
        if ours and "--role" in words and "secondary" in words and role in ("", words[words.index("--role") + 1]):
            found.append(process)
    return [process for process in found if process.status() != psutil.STATUS_ZOMBIE and process.pid != os.getpid()]


def actor_of(node: psutil.Process) -> psutil.Process:
    """The actor that supervises a node."""
    parent = node.parent()
    assert parent
    return parent


def machine_of(cluster: Cluster, node: psutil.Process) -> Any:
    """The machine that a node runs on, as `Cluster.remove_node` takes it."""
    above = {process.pid for process in node.parents()}
    return next(machine for machine in cluster.worker_nodes if machine.all_processes["raylet"][0].process.pid in above)
