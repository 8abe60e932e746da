"""Which layers go to which node: arithmetic on half-open layer ranges. Reads no files and loads nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

from mdi.core.dtypes import parse_dtype
from mdi.core.errors import ConfigError
from mdi.models.config import ModelConfig
from mdi.models.weights import StageSpec, layer_shapes, stage_shapes, vision_shapes
from mdi.planning.hardware import Machine

VISION_SHARE = 0.02
"""Share of the vision tower's weights that a step is charged with: one encoding serves tens of steps."""

VISION = "vision"
"""The role of a node that has the vision tower and nothing else."""

PROMPT_TOKENS = 3.0
"""Tokens of a prompt for each of its answer that machines are weighed for: an image, say, and some lines about it."""

SMALLER = "Add a node or memory, or serve fewer or shorter sequences (--max-sequences, --sequence-length)"


@dataclass(frozen=True)
class Plan:
    """One stage per node, in pipeline order: every layer exactly once, embedding first, head last.

    vision: what a node beside the pipeline holds, the vision tower alone; None where the starter has it.
    Raises ConfigError for stages that are not that.
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
        """What each node holds, by its name, in pipeline order; a vision node comes last."""
        roles = dict(zip(role_names(self.n_nodes), self.stages, strict=True))
        return roles | ({VISION: self.vision} if self.vision else {})


@dataclass(frozen=True)
class Costs:
    """Weights read in one decode step, in parameters: by a layer, by the LM head, by the starter's extras."""

    layer: int
    head: int
    start: int


@dataclass(frozen=True)
class StageLoad:
    """What a stage with so many layers costs a node: `fixed` and `layer` for each; it has room for `most`."""

    fixed: float
    layer: float
    most: int

    def cost(self, n_layers: int) -> float:
        return self.fixed + n_layers * self.layer


@dataclass(frozen=True)
class StageSummary:
    """What a stage holds. step_share: its part of the weights that one decode step reads over all nodes.

    step_parameters: those. cache_bytes: of the KV cache of all slots.
    """

    parameters: int
    size_bytes: int
    step_parameters: int
    step_share: float
    cache_bytes: int


def costs(config: ModelConfig) -> Costs:
    """Costs of a model's parts. The embedding is a row lookup and costs nothing."""
    vision = _count(vision_shapes(config.vision)) if config.vision else 0
    head = config.vocab_size * config.hidden_size
    return Costs(_count(layer_shapes(config, 0)), head, int(vision * VISION_SHARE))


def make_plan(
    config: ModelConfig,
    n_nodes: int,
    layers: Sequence[int] | None = None,
    *,
    machines: Sequence[Machine] = (),
    dtype: str | None = None,
    cache_tokens: int = 0,
    vision_node: bool = False,
) -> Plan:
    """The plan whose slowest node is fastest; `layers` sets the layers per node by hand.

    machines: one for each node; without them all are alike. dtype: the checkpoint's own if None. cache_tokens: the KV
    cache's slots times their length, over all of which a stage's memory is counted. vision_node: the vision tower is
    on a node of its own.
    Raises ConfigError when the layers cannot be split that way, or do not fit: it says how much is missing.
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
    needs = _Needs(config, dtype or config.dtype, cache_tokens, vision_node)
    _check_memory(needs, machines, layers)
    return _plan(config, layers or balance(config.n_layers, needs.loads(machines)), vision_node)


def balance(n_layers: int, loads: Sequence[StageLoad]) -> tuple[int, ...]:
    """Layers per node that minimise the costliest node; among those, the sum of squares.

    Every node gets a layer, and none more than it has room for: there must be room for all.
    """
    worst, _ = _split(n_layers, loads, math.inf, max)
    _, split = _split(n_layers, loads, worst, lambda squares, cost: squares + cost**2)
    return split


def _split(
    n_layers: int, loads: Sequence[StageLoad], limit: float, add: Callable[[float, float], float]
) -> tuple[float, tuple[int, ...]]:
    """The least sum, by `add`, of the nodes' costs, none above `limit`, and its split. Dynamic programming."""
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}  # by layers placed
    for node, load in enumerate(loads):
        after: dict[int, tuple[float, tuple[int, ...]]] = {}
        for placed, (total, split) in best.items():
            left = n_layers - placed - (len(loads) - node - 1)
            for count in range(1, min(left, load.most) + 1):
                if load.cost(count) <= limit:
                    candidate = (add(total, load.cost(count)), (*split, count))
                    after[placed + count] = min(after.get(placed + count, candidate), candidate)
        best = after
    return best[n_layers]


@dataclass(frozen=True)
class _Needs:
    """What stages of a model take, in seconds and bytes."""

    config: ModelConfig
    dtype: str
    cache_tokens: int
    vision_node: bool

    @property
    def itemsize(self) -> int:
        return parse_dtype(self.dtype).itemsize

    @property
    def layer_bytes(self) -> int:
        """Of one layer's weights, and of its part of the cache."""
        cache = self.cache_tokens * 2 * self.config.kv_size
        return (costs(self.config).layer + cache) * self.itemsize

    def fixed_bytes(self, index: int, n_nodes: int) -> int:
        """Of what a node has besides layers."""
        sees = index == 0 and self.config.vision is not None and not self.vision_node
        none = StageSpec(0, 0, index == 0, sees, index == n_nodes - 1)
        return _count(stage_shapes(self.config, none)) * self.itemsize

    def loads(self, machines: Sequence[Machine]) -> list[StageLoad]:
        """In seconds for a token of the answer, with what it takes of the prompt."""
        cost, n_nodes = costs(self.config), len(machines)
        loads = []
        for index, machine in enumerate(machines):
            extra = cost.start * (index == 0 and not self.vision_node) + cost.head * (index == n_nodes - 1)
            room = (machine.memory_bytes - self.fixed_bytes(index, n_nodes)) / self.layer_bytes
            most = int(max(0, min(room, self.config.n_layers)))
            loads.append(StageLoad(self._seconds(machine, extra), self._seconds(machine, cost.layer), most))
        return loads

    def _seconds(self, machine: Machine, parameters: int) -> float:
        prompt_s = PROMPT_TOKENS * machine.prompt_token_s(parameters)
        return machine.token_s(parameters * self.itemsize) + prompt_s


def _check_memory(needs: _Needs, machines: Sequence[Machine], layers: Sequence[int] | None) -> None:
    names, n_layers = role_names(len(machines)), needs.config.n_layers
    for index, (name, machine) in enumerate(zip(names, machines, strict=True)):
        count = layers[index] if layers else 1
        missing = needs.fixed_bytes(index, len(machines)) + count * needs.layer_bytes - machine.memory_bytes
        if missing > 0:
            raise ConfigError(
                f"{name} cannot hold {count} layer{'s' * (count > 1)}: of its {_gb(machine.memory_bytes)}, "
                f"{_gb(missing)} are missing. {SMALLER}"
            )
    room = sum(load.most for load in needs.loads(machines))
    if layers is None and room < n_layers:
        raise ConfigError(
            f"the nodes have room for {room} of the model's {n_layers} layers: "
            f"{_gb((n_layers - room) * needs.layer_bytes)} are missing. {SMALLER}"
        )


def _gb(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.1f} GB"


def role_names(n_nodes: int) -> tuple[str, ...]:
    """Names of the nodes in pipeline order: starter, secondary0..., finisher."""
    if n_nodes == 1:
        return ("starter",)
    return ("starter", *(f"secondary{index}" for index in range(n_nodes - 2)), "finisher")


def stage_summary(config: ModelConfig, spec: StageSpec, dtype: str, cache_tokens: int = 0) -> StageSummary:
    """Parameters, bytes in `dtype`, and share of a decode step of one stage; cache_tokens: see `make_plan`."""
    parameters, itemsize = _count(stage_shapes(config, spec)), parse_dtype(dtype).itemsize
    cost = costs(config)
    load = len(spec.layers) * cost.layer + cost.start * spec.vision + cost.head * spec.head
    total = config.n_layers * cost.layer + cost.start + cost.head
    cache_bytes = len(spec.layers) * cache_tokens * 2 * config.kv_size * itemsize
    return StageSummary(parameters, parameters * itemsize, load, load / total, cache_bytes)


def _plan(config: ModelConfig, layers: Sequence[int], vision_node: bool) -> Plan:
    stages, first = [], 0
    for index, count in enumerate(layers):
        start, end = index == 0, index == len(layers) - 1
        vision = start and config.vision is not None and not vision_node
        stages.append(StageSpec(first, first + count, embedding=start, vision=vision, head=end))
        first += count
    return Plan(tuple(stages), StageSpec(0, 0, vision=True) if vision_node else None)


def _check_layers(config: ModelConfig, n_nodes: int, layers: Sequence[int]) -> None:
    text = ",".join(map(str, layers))
    if len(layers) != n_nodes:
        raise ConfigError(f"layers {text} names {len(layers)} nodes, but there are {n_nodes}")
    if min(layers) < 1:
        raise ConfigError(f"layers {text}: every node needs at least one layer")
    if sum(layers) != config.n_layers:
        raise ConfigError(f"layers {text} add up to {sum(layers)}, but the model has {config.n_layers}")


def _count(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(map(prod, shapes.values()))
