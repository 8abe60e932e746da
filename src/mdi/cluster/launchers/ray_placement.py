"""What a server asks of the Ray cluster that it has joined: how many nodes, where, and what each reserves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mdi.checkpoint.manifest import Manifest
from mdi.cluster.launchers.ray_bundles import Bundle, Placing, RayMachine, check_room, count_nodes, make_bundles
from mdi.cluster.launchers.ray_cluster import RayCluster
from mdi.core.config import CacheSettings, RayNodes
from mdi.core.errors import ConfigError
from mdi.models.config import ModelConfig
from mdi.models.parts import Parts
from mdi.planning.cache import CACHE_SHARE, PLANNED_TOKENS, planned_bytes, token_bytes

PROCESS_BYTES = 0.5e9  # of a node beside weights and cache


@dataclass
class RayPlacement:
    """The connection to the cluster, and what is asked of it. bundles: what was reserved, once it is known."""

    cluster: RayCluster
    placing: Placing
    asked: Mapping[str, float]
    device: str
    bundles: Sequence[Bundle] = field(default=())

    @classmethod
    def connect(cls, settings: RayNodes, device: str) -> RayPlacement:
        """Joins the cluster. Raises ConfigError, with the remedy, where that cannot be done."""
        cluster = RayCluster.connect(settings.ray or "")
        gpu = {"GPU": 1.0} if device.startswith("cuda") else {}
        placing = Placing(settings.ray_strategy, settings.ray_labels or {}, cluster.here)
        return cls(cluster, placing, {**gpu, **(settings.ray_resources or {})}, device)

    @property
    def memory_gb(self) -> list[float]:
        """What each node may use, in 1e9 bytes, in the order of the bundles."""
        return [bundle.memory_gb for bundle in self.bundles]

    def machines(self) -> list[RayMachine]:
        """Those that may get nodes, as they are now."""
        return self.placing.allowed(self.cluster.machines())

    def count_nodes(self, n_layers: int) -> int:
        """As many as there are machines, the starter's among them. Raises ConfigError when there is no other."""
        machines = self.cluster.machines()
        if (count := count_nodes(machines, self.asked, self.placing)) == 1:
            raise ConfigError(
                f"the Ray cluster has no machine beside this one that could get a node; it has "
                f"{', '.join(machine.name for machine in machines)}. Add some (ray start --address=...), or say how "
                "many nodes one gets: --n-nodes 2 --ray-strategy PACK"
            )
        return min(count, n_layers)

    def reserve(self, manifest: Manifest, model: ModelConfig, cache: CacheSettings) -> None:
        """Decides what each node reserves. Raises ConfigError when the cluster could not hold that even idle."""
        machines = self.cluster.machines()
        needs = memory_of_roles(manifest, model, cache)
        self.bundles = make_bundles(needs, self.asked, machines, self.placing)
        check_room(self.bundles, machines, self.placing)

    def close(self) -> None:
        """Leaves the cluster. Safe to call twice."""
        self.cluster.close()


def memory_of_roles(manifest: Manifest, model: ModelConfig, cache: CacheSettings) -> dict[str, float]:
    """What each node but the starter takes, in bytes: weights, KV cache, and the process with its activations.

    Without --kv-cache-gb there is room for 4,096 tokens of each sample that may run at once, or as many as it may have.
    """
    longest = cache.sequence_length_for(model.max_positions)
    tokens = cache.max_sequences * (longest if cache.sequence_length else min(PLANNED_TOKENS, longest))
    share = CACHE_SHARE if cache.kv_cache_gb is None else 1.0  # of what is left beside the weights: see cache_budget
    needs = dict[str, float]()
    for chunk in manifest.chunks[1:]:
        own = Parts.of(model, chunk.spec, manifest.quantization).config
        each = token_bytes(own, cache.kv_cache_dtype or manifest.dtype, len(chunk.spec.layers))
        needs[chunk.role] = chunk.size_bytes + min(tokens * each, planned_bytes(cache)) / share + PROCESS_BYTES
    return needs
