"""Which layers go to which node: arithmetic on half-open layer ranges. Reads no files and loads nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from mdi.checkpoint.source import parse_dtype
from mdi.errors import ConfigError
from mdi.model.config import ModelConfig
from mdi.model.weights import StageSpec, layer_shapes, stage_shapes, vision_shapes

VISION_SHARE = 0.02
"""Share of the vision tower's weights that a step is charged with: one encoding serves tens of steps."""


@dataclass(frozen=True)
class Plan:
    """One stage per node, in pipeline order: every layer exactly once, embedding first, head last.

    Raises ConfigError for stages that are not that.
    """

    stages: tuple[StageSpec, ...]

    def __post_init__(self) -> None:
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


@dataclass(frozen=True)
class Costs:
    """Weights read in one decode step, in parameters: by a layer, by the LM head, by the starter's extras."""

    layer: int
    head: int
    start: int


@dataclass(frozen=True)
class StageSummary:
    """What a stage holds. step_share: its part of the weights that one decode step reads over all nodes."""

    parameters: int
    size_bytes: int
    step_share: float


def costs(config: ModelConfig) -> Costs:
    """Costs of a model's parts. The embedding is a row lookup and costs nothing."""
    vision = _count(vision_shapes(config.vision)) if config.vision else 0
    head = config.vocab_size * config.hidden_size
    return Costs(_count(layer_shapes(config, 0)), head, int(vision * VISION_SHARE))


def make_plan(config: ModelConfig, n_nodes: int, layers: Sequence[int] | None = None) -> Plan:
    """The plan whose slowest node is fastest; `layers` sets the layers per node by hand.

    Raises ConfigError when the layers cannot be split that way.
    """
    if n_nodes < 1:
        raise ConfigError(f"a model needs at least one node, got {n_nodes}")
    if n_nodes > config.n_layers:
        raise ConfigError(f"{n_nodes} nodes are more than the model's {config.n_layers} layers: use fewer")
    if layers is not None:
        _check_layers(config, n_nodes, layers)
    return _plan(config, layers or balance(config.n_layers, n_nodes, costs(config)))


def balance(n_layers: int, n_nodes: int, cost: Costs) -> tuple[int, ...]:
    """Layers per node that minimise the costliest node; among those, the sum of squares. Dynamic programming.

    The starter is charged `cost.start` and the finisher `cost.head` on top; every node gets a layer.
    """
    # layers placed -> (worst, squares, split)
    best: dict[int, tuple[int, int, tuple[int, ...]]] = {0: (0, 0, ())}
    for node in range(n_nodes):
        extra = cost.start * (node == 0) + cost.head * (node == n_nodes - 1)
        after: dict[int, tuple[int, int, tuple[int, ...]]] = {}
        for placed, (worst, squares, split) in best.items():
            for count in range(1, n_layers - placed - (n_nodes - node - 1) + 1):
                load = count * cost.layer + extra
                candidate = (max(worst, load), squares + load**2, (*split, count))
                after[placed + count] = min(after.get(placed + count, candidate), candidate)
        best = after
    return best[n_layers][2]


def role_names(n_nodes: int) -> tuple[str, ...]:
    """Names of the nodes in pipeline order: starter, secondary0..., finisher."""
    if n_nodes == 1:
        return ("starter",)
    return ("starter", *(f"secondary{index}" for index in range(n_nodes - 2)), "finisher")


def stage_summary(config: ModelConfig, spec: StageSpec, dtype: str) -> StageSummary:
    """Parameters, bytes in `dtype`, and share of a decode step of one stage."""
    parameters = _count(stage_shapes(config, spec))
    cost = costs(config)
    load = len(spec.layers) * cost.layer + cost.start * spec.vision + cost.head * spec.head
    total = config.n_layers * cost.layer + cost.start + cost.head
    return StageSummary(parameters, parameters * parse_dtype(dtype).itemsize, load / total)


def _plan(config: ModelConfig, layers: Sequence[int]) -> Plan:
    stages, first = [], 0
    for index, count in enumerate(layers):
        start, end = index == 0, index == len(layers) - 1
        vision = start and config.vision is not None
        stages.append(StageSpec(first, first + count, embedding=start, vision=vision, head=end))
        first += count
    return Plan(tuple(stages))


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
