"""The plan: which layers go to which node. Arithmetic on half-open ranges of layers; reads no files, loads nothing."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from itertools import accumulate, pairwise
from typing import TypeVar

from mdi.core.errors import ConfigError
from mdi.core.group import Rank
from mdi.core.quantization import UNQUANTIZED, ModelQuantization
from mdi.models.config import ModelConfig, StageSpec
from mdi.planning.groups import group_ranks
from mdi.planning.hardware import Machine
from mdi.planning.predict import NodeNeeds, StageLoad, layer_summary, stage_summary

T = TypeVar("T")

VISION = "vision"
"""The role of a node that has the vision tower and nothing else."""

SMALLER = "Add a node or memory, or keep less in the KV cache (--kv-cache-gb, --sequence-length)"


@dataclass(frozen=True)
class Plan:
    """What each node has, in pipeline order: every layer exactly once, embedding first, head last.

    stages: one for each node. Neighbours with the same layers are the ranks of one group: each has some shards of them,
    and of the head, and together they have all, in order.
    vision: the vision tower alone, on a node beside the pipeline; None where the starter has it.
    left_out: machines that get nothing, by their places among all, because the others are faster without them.
    Raises ConfigError for other stages.
    """

    stages: tuple[StageSpec, ...]
    vision: StageSpec | None = None
    left_out: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.stages:
            raise ConfigError("a plan needs a stage")
        if list(self.left_out) != sorted(set(self.left_out) & set(range(1, self.n_machines))):
            raise ConfigError("a plan can leave out machines that there are, but the starter")
        groups, first = self._grouped, 0
        for index, group in enumerate(groups):
            _check_ranks(group, self.n_shards)
            for place, stage in enumerate(group):
                ends = (index == place == 0, index == len(groups) - 1)
                if stage.first_layer != first or not stage.layers or (stage.embedding, stage.head) != ends:
                    raise ConfigError(
                        "a plan's stages must hold every layer once, in order, embedding first and head last"
                    )
            first = group[0].last_layer

    @property
    def n_nodes(self) -> int:
        return len(self.stages)

    @property
    def n_machines(self) -> int:
        """The nodes, and the machines left out."""
        return self.n_nodes + len(self.left_out)

    @property
    def places(self) -> tuple[int, ...]:
        """Of the nodes among all machines."""
        return tuple(place for place in range(self.n_machines) if place not in self.left_out)

    @property
    def unused(self) -> tuple[str, ...]:
        """What machines that are left out would be called."""
        names = role_names(self.n_machines)
        return tuple(names[place] for place in self.left_out)

    @property
    def groups(self) -> tuple[int, ...]:
        """The ranks of each stage: 1 where a node computes it alone."""
        return tuple(map(len, self._grouped))

    @property
    def n_shards(self) -> int:
        """Of all groups alike; 1 without groups."""
        return next((stage.rank.n_shards for stage in self.stages if stage.rank), 1)

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers of each stage, which the ranks of a group share."""
        return tuple(len(group[0].layers) for group in self._grouped)

    @property
    def _grouped(self) -> list[list[StageSpec]]:
        """The nodes of each stage."""
        grouped = list[list[StageSpec]]()
        for stage in self.stages:
            if not grouped or stage.rank is None or stage.rank.leads:
                grouped.append([])
            grouped[-1].append(stage)
        return grouped

    @property
    def roles(self) -> dict[str, StageSpec]:
        """The stage of each role, in pipeline order. A vision node comes last. Machines are named as if all had one."""
        names = role_names(self.n_machines)
        roles = {names[place]: stage for place, stage in zip(self.places, self.stages, strict=True)}
        return roles | ({VISION: self.vision} if self.vision else {})


def make_plan(
    config: ModelConfig,
    n_nodes: int,
    layers: Sequence[int] | None = None,
    *,
    groups: Sequence[int] | None = None,
    shards: int = 1,
    machines: Sequence[Machine] = (),
    dtype: str | None = None,
    quantization: ModelQuantization = UNQUANTIZED,
    cache_tokens: int = 0,
    most_cache_bytes: float = math.inf,
    cache_dtype: str | None = None,
    vision_node: bool = False,
) -> Plan:
    """The plan whose slowest node is fastest, or the one with these `layers` for each stage.

    groups: ranks of each stage; None is one node a stage. shards: of a plan with groups; 1 is as few as suit them.
    machines: one for each node; without them all are alike. dtype: of the stages; None is the checkpoint's own.
    cache_tokens: tokens that every node's KV cache is to have memory for, but no more than most_cache_bytes.
    cache_dtype: of the cache, where it is not that of the stages.
    vision_node: the vision tower is on a node of its own.
    Raises ConfigError when the model cannot be split that way, or does not fit, with what is missing.
    """
    if n_nodes < 1:
        raise ConfigError(f"a model needs at least one node, got {n_nodes}")
    groups = (1,) * n_nodes if groups is None else tuple(groups)
    _check_groups(config, n_nodes, groups)
    if layers is not None:
        _check_layers(config, groups, layers)
    if vision_node and config.vision is None:
        raise ConfigError("the model has no vision tower for a node of its own: leave the vision node out")
    machines, dtype = machines or [Machine()] * n_nodes, dtype or config.dtype
    ranks = group_ranks(config, groups, machines, quantization, shards)
    ends = _ends(config, groups, ranks, vision_node)
    needs = [
        NodeNeeds(
            stage_summary(config, spec, dtype, quantization=quantization),
            layer_summary(config, dtype, cache_tokens, quantization, cache_dtype, spec.rank),
            most_cache_bytes,
        )
        for spec in ends
    ]
    _check_memory(config.n_layers, needs, machines, groups, layers)
    loads = [need.load(machine, config.n_layers) for need, machine in zip(needs, machines, strict=True)]
    counts = layers or balance(config.n_layers, [_together(stage) for stage in _by_stage(loads, groups)])
    return _plan(ends, groups, counts, vision_node)


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


def _together(ranks: Sequence[StageLoad]) -> StageLoad:
    """The load of a stage: its slowest rank's, and the room of that with the least."""
    fixed, layer, most = zip(*(astuple(rank) for rank in ranks), strict=True)
    return StageLoad(max(fixed), max(layer), min(most))


def _check_memory(
    n_layers: int,
    needs: Sequence[NodeNeeds],
    machines: Sequence[Machine],
    groups: Sequence[int],
    layers: Sequence[int] | None,
) -> None:
    counts = [count for count, size in zip(layers or [1] * len(groups), groups, strict=True) for _ in range(size)]
    for name, need, machine, count in zip(role_names(len(needs)), needs, machines, counts, strict=True):
        missing = need.memory_bytes(count) - machine.memory_bytes
        if missing > 0:
            raise ConfigError(
                f"{name} cannot hold {count} layer{'s' * (count > 1)}: of its {_gb(machine.memory_bytes)}, "
                f"{_gb(missing)} are missing. {SMALLER}"
            )
    rooms = [need.load(machine, n_layers).most for need, machine in zip(needs, machines, strict=True)]
    room = sum(min(stage) for stage in _by_stage(rooms, groups))
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


def _plan(ends: Sequence[StageSpec], groups: Sequence[int], layers: Sequence[int], vision_node: bool) -> Plan:
    stages, first = list[StageSpec](), 0
    for group, count in zip(_by_stage(ends, groups), layers, strict=True):
        stages += [replace(rank, first_layer=first, last_layer=first + count) for rank in group]
        first += count
    return Plan(tuple(stages), StageSpec(0, 0, vision=True) if vision_node else None)


def _ends(
    config: ModelConfig, groups: Sequence[int], ranks: Sequence[Rank | None], vision_node: bool
) -> list[StageSpec]:
    """What each node has besides layers: all ranks of the last stage have a part of the head."""
    vision = config.vision is not None and not vision_node
    first_of_last = len(ranks) - groups[-1]
    return [
        StageSpec(0, 0, embedding=index == 0, vision=vision and index == 0, head=index >= first_of_last, rank=rank)
        for index, rank in enumerate(ranks)
    ]


def _by_stage(nodes: Sequence[T], groups: Sequence[int]) -> list[Sequence[T]]:
    """What belongs to each node, by stages."""
    return [nodes[first:last] for first, last in pairwise([0, *accumulate(groups)])]


def _check_ranks(group: Sequence[StageSpec], n_shards: int) -> None:
    """Raises ConfigError unless the nodes of a stage have its shards once, in order, and the same layers."""
    ranks = [stage.rank for stage in group if stage.rank]
    contiguous = [*(rank.first_shard for rank in ranks), n_shards] == [0, *(rank.last_shard for rank in ranks)]
    whole = all(rank.shards and rank.n_shards == n_shards for rank in ranks)
    complete = len(ranks) == len(group) > 1 and contiguous and whole
    if not (complete or not ranks) or len({stage.layers for stage in group}) > 1:
        raise ConfigError("the ranks of a stage must have the same layers, and every shard once, in order")


def _check_groups(config: ModelConfig, n_nodes: int, groups: Sequence[int]) -> None:
    text = ",".join(map(str, groups))
    if not groups or min(groups) < 1:
        raise ConfigError(f"groups {text}: every stage needs at least one node")
    if sum(groups) != n_nodes:
        raise ConfigError(f"groups {text} are {sum(groups)} nodes in all, but there are {n_nodes}")
    if len(groups) > config.n_layers:
        raise ConfigError(
            f"{len(groups)} {_stages(groups)} are more than the model's {config.n_layers} layers: use fewer"
        )


def _check_layers(config: ModelConfig, groups: Sequence[int], layers: Sequence[int]) -> None:
    text, what = ",".join(map(str, layers)), _stages(groups)
    if len(layers) != len(groups):
        raise ConfigError(f"layers {text} names {len(layers)} {what}, but there are {len(groups)}")
    if min(layers) < 1:
        raise ConfigError(f"layers {text}: every {what.removesuffix('s')} needs at least one layer")
    if sum(layers) != config.n_layers:
        raise ConfigError(f"layers {text} add up to {sum(layers)}, but the model has {config.n_layers}")


def _stages(groups: Sequence[int]) -> str:
    """What messages call them: who has no groups knows nodes."""
    return "nodes" if max(groups) == 1 else "stages"
