"""The plan: which layers go to which node. Arithmetic on half-open ranges of layers; reads no files, loads nothing."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mdi.core.errors import ConfigError
from mdi.core.quantization import UNQUANTIZED, ModelQuantization
from mdi.models.config import ModelConfig, StageSpec
from mdi.planning.hardware import Machine
from mdi.planning.predict import NodeNeeds, StageLoad, layer_summary, stage_summary

VISION = "vision"
"""The role of a node that has the vision tower and nothing else."""

SMALLER = "Add a node or memory, or keep less in the KV cache (--kv-cache-gb, --sequence-length)"


@dataclass(frozen=True)
class Plan:
    """One stage for each node, in pipeline order: every layer exactly once, embedding first, head last.

    vision: the vision tower alone, on a node beside the pipeline; None where the starter has it.
    Raises ConfigError for other stages.
    """

    stages: tuple[StageSpec, ...]
    vision: StageSpec | None = None

    def __post_init__(self) -> None:
        if not self.stages:
            raise ConfigError("a plan needs a stage")
        first = 0
        for index, stage in enumerate(self.stages):
            ends = (index == 0, index == self.n_nodes - 1)
            if stage.first_layer != first or not stage.layers or (stage.embedding, stage.head) != ends:
                raise ConfigError("a plan's stages must hold every layer once, in order, embedding first and head last")
            first = stage.last_layer

    @property
    def n_nodes(self) -> int:
        return len(self.stages)

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers per node."""
        return tuple(len(stage.layers) for stage in self.stages)

    @property
    def roles(self) -> dict[str, StageSpec]:
        """The stage of each role, in pipeline order. A vision node comes last."""
        roles = dict(zip(role_names(self.n_nodes), self.stages, strict=True))
        return roles | ({VISION: self.vision} if self.vision else {})


def make_plan(
    config: ModelConfig,
    n_nodes: int,
    layers: Sequence[int] | None = None,
    *,
    machines: Sequence[Machine] = (),
    dtype: str | None = None,
    quantization: ModelQuantization = UNQUANTIZED,
    cache_tokens: int = 0,
    most_cache_bytes: float = math.inf,
    cache_dtype: str | None = None,
    vision_node: bool = False,
) -> Plan:
    """The plan whose slowest node is fastest, or the one with these `layers` for each node.

    machines: one for each node; without them all are alike. dtype: of the stages; None is the checkpoint's own.
    cache_tokens: tokens that every node's KV cache is to have memory for, but no more than most_cache_bytes.
    cache_dtype: of the cache, where it is not that of the stages.
    vision_node: the vision tower is on a node of its own.
    Raises ConfigError when the layers cannot be split that way, or do not fit, with what is missing.
    """
    if n_nodes < 1:
        raise ConfigError(f"a model needs at least one node, got {n_nodes}")
    if n_nodes > config.n_layers:
        raise ConfigError(f"{n_nodes} nodes are more than the model's {config.n_layers} layers: use fewer")
    if layers is not None:
        _check_layers(config, n_nodes, layers)
    machines = machines or [Machine()] * n_nodes
    if vision_node and config.vision is None:
        raise ConfigError("the model has no vision tower for a node of its own: leave the vision node out")
    ends, dtype = _ends(config, n_nodes, vision_node), dtype or config.dtype
    layer = layer_summary(config, dtype, cache_tokens, quantization, cache_dtype)
    parts = [stage_summary(config, spec, dtype, quantization=quantization) for spec in ends]
    needs = [NodeNeeds(part, layer, most_cache_bytes) for part in parts]
    _check_memory(config.n_layers, needs, machines, layers)
    loads = [need.load(machine, config.n_layers) for need, machine in zip(needs, machines, strict=True)]
    return _plan(config, layers or balance(config.n_layers, loads), vision_node)


def balance(n_layers: int, loads: Sequence[StageLoad]) -> tuple[int, ...]:
    """Layers per node that minimise the cost of the costliest node, and among those the sum of squares.

    Every node gets a layer, and none more than it has room for: there must be room for all. Dynamic programming.
    """
    limit = _least_limit(n_layers, loads)
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}  # by layers placed: sum of squares, split
    for node, load in enumerate(loads):
        squares = [load.cost(count) ** 2 for count in range(1, _most_within(load, limit) + 1)]
        after: dict[int, tuple[float, tuple[int, ...]]] = {}
        for placed, (total, split) in best.items():
            left = n_layers - placed - (len(loads) - node - 1)
            for count, square in enumerate(squares[:left], start=1):
                candidate = (total + square, (*split, count))
                after[placed + count] = min(after.get(placed + count, candidate), candidate)
        best = after
    return best[n_layers][1]


def _least_limit(n_layers: int, loads: Sequence[StageLoad]) -> float:
    """The least cost of the costliest node over all splits."""

    def fits(limit: float) -> bool:
        counts = [_most_within(load, limit) for load in loads]
        return min(counts) > 0 and sum(counts) >= n_layers

    costs = sorted({load.cost(count) for load in loads for count in range(1, load.most + 1)})
    return costs[bisect_left(costs, True, key=fits)]


def _most_within(load: StageLoad, limit: float) -> int:
    """The most layers that cost a node no more than the limit."""
    return bisect_right(range(1, load.most + 1), limit, key=load.cost)


def _check_memory(
    n_layers: int, needs: Sequence[NodeNeeds], machines: Sequence[Machine], layers: Sequence[int] | None
) -> None:
    for index, (name, need, machine) in enumerate(zip(role_names(len(needs)), needs, machines, strict=True)):
        count = layers[index] if layers else 1
        missing = need.memory_bytes(count) - machine.memory_bytes
        if missing > 0:
            raise ConfigError(
                f"{name} cannot hold {count} layer{'s' * (count > 1)}: of its {_gb(machine.memory_bytes)}, "
                f"{_gb(missing)} are missing. {SMALLER}"
            )
    room = sum(need.load(machine, n_layers).most for need, machine in zip(needs, machines, strict=True))
    if layers is None and room < n_layers:
        raise ConfigError(
            f"the nodes have room for {room} of the model's {n_layers} layers: "
            f"{_gb(needs[0].memory_bytes(n_layers) - needs[0].memory_bytes(room))} are missing. {SMALLER}"
        )


def _gb(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.1f} GB"


def role_names(n_nodes: int) -> tuple[str, ...]:
    """Names of the nodes in pipeline order: starter, secondary0..., finisher."""
    if n_nodes == 1:
        return ("starter",)
    return ("starter", *(f"secondary{index}" for index in range(n_nodes - 2)), "finisher")


def _plan(config: ModelConfig, layers: Sequence[int], vision_node: bool) -> Plan:
    stages, first = [], 0
    for ends, count in zip(_ends(config, len(layers), vision_node), layers, strict=True):
        stages.append(replace(ends, first_layer=first, last_layer=first + count))
        first += count
    return Plan(tuple(stages), StageSpec(0, 0, vision=True) if vision_node else None)


def _ends(config: ModelConfig, n_nodes: int, vision_node: bool) -> list[StageSpec]:
    """What each node has besides layers."""
    vision = config.vision is not None and not vision_node
    return [
        StageSpec(0, 0, embedding=index == 0, vision=vision and index == 0, head=index == n_nodes - 1)
        for index in range(n_nodes)
    ]


def _check_layers(config: ModelConfig, n_nodes: int, layers: Sequence[int]) -> None:
    text = ",".join(map(str, layers))
    if len(layers) != n_nodes:
        raise ConfigError(f"layers {text} names {len(layers)} nodes, but there are {n_nodes}")
    if min(layers) < 1:
        raise ConfigError(f"layers {text}: every node needs at least one layer")
    if sum(layers) != config.n_layers:
        raise ConfigError(f"layers {text} add up to {sum(layers)}, but the model has {config.n_layers}")
