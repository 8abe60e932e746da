"""What nodes have left for their KV caches: of each its own layers and KV heads."""

from __future__ import annotations

from pathlib import Path

from testing.checkpoints import tiny_text_config

from mdi.checkpoint.loader import load_source
from mdi.checkpoint.random_weights import write_random_checkpoint
from mdi.checkpoint.source import open_source
from mdi.cluster.cache_memory import cache_nodes
from mdi.cluster.node_client import NodeAddress
from mdi.planning.cache import CacheNode
from mdi.planning.plan import make_plan
from mdi.rpc import node_pb2


def test_a_rank_has_a_cache_for_its_own_kv_heads(tmp_path: Path) -> None:
    config = tiny_text_config(num_attention_heads=12, head_dim=16)
    source = open_source(write_random_checkpoint(tmp_path / "model", config))
    stages = make_plan(source.model_config, 4, (4, 2), groups=(3, 1)).stages
    nodes = [NodeAddress(f"node{index}", f"10.0.0.{index}:5000") for index in (1, 2, 3)]
    statuses = [node_pb2.NodeStatus(device="cpu", free_bytes=1000 * index) for index in (1, 2, 3)]
    here, *others = cache_nodes(load_source(source, stages[0]), stages, nodes, statuses, [])
    assert (here.name, here.n_layers, here.n_kv_heads) == ("starter", 4, 1)
    assert others == [
        CacheNode("node1", 4, 1000, n_kv_heads=2),  # with three ranks the middle one has both
        CacheNode("node2", 4, 2000, n_kv_heads=1),
        CacheNode("node3", 2, 3000, n_kv_heads=2),
    ]
