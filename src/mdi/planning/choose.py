"""The choice among one node, a layer split, groups, and fewer machines, by predicted times.

Pure arithmetic on measured machines and links. Predictions are for comparing plans; see `Step` for what they count.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from operator import attrgetter
from typing import Literal

from mdi.core.errors import ConfigError
from mdi.core.quantization import UNQUANTIZED, ModelQuantization
from mdi.core.tensors import TensorSpec
from mdi.models.config import ModelConfig, StageSpec
from mdi.planning.groups import MOST_RANKS
from mdi.planning.hardware import LinkSpeed, Machine
from mdi.planning.plan import Plan, make_plan
from mdi.planning.predict import PROMPT_TOKENS, StageSummary, layer_summary, stage_summary

Goal = Literal["latency", "throughput"]

UNMEASURED_LINK = LinkSpeed(rtt_s=0.2e-3, bytes_per_s=125e6)
"""What is assumed of machines whose link was not measured: 0.2 ms there and back, 1 Gb/s."""

EXCHANGE_S = 70e-6
"""Of an exchange between ranks in a step, besides the link: encryption, and calls whose code weights left no cache."""

HOP_S = 0.25e-3
"""Of a batch's way from one stage to the next, besides the link."""

WORTHWHILE = 0.8
"""Machines are left out where that takes at most this part of the time: one stream's is predicted to about a fifth."""

EVERY_SPLIT = 5
"""Up to so many nodes every way to group neighbours is tried; beyond, groups of equal size."""


@dataclass(frozen=True)
class Links:
    """The links between nodes, by their places in the pipeline. known: those that were measured, by (lower, higher)."""

    known: Mapping[tuple[int, int], LinkSpeed] = field(default_factory=dict)

    def between(self, one: int, other: int) -> LinkSpeed:
        return self.known.get((min(one, other), max(one, other)), UNMEASURED_LINK)

    def worst(self, nodes: Sequence[int]) -> LinkSpeed:
        """Of a group: its slowest round trip, and its slowest rate."""
        pairs = [self.between(one, other) for place, one in enumerate(nodes) for other in nodes[:place]]
        return LinkSpeed(max(pair.rtt_s for pair in pairs), min(pair.bytes_per_s for pair in pairs))


@dataclass(frozen=True)
class Job:
    """What plans are compared for. dtype: of the stages. streams: that decode at once, for throughput.

    prompt_tokens: for each token of an answer. cache_tokens, most_cache_bytes, cache_dtype, vision_node: as `make_plan`
    takes them.
    """

    config: ModelConfig
    dtype: str
    quantization: ModelQuantization = UNQUANTIZED
    optimize: Goal = "latency"
    streams: int = 16
    prompt_tokens: float = PROMPT_TOKENS
    cache_tokens: int = 0
    most_cache_bytes: float = math.inf
    cache_dtype: str | None = None
    vision_node: bool = False
    shards: int = 1

    def plan(self, machines: Sequence[Machine], groups: Sequence[int], layers: Sequence[int] | None = None) -> Plan:
        """Raises ConfigError where it is impossible, or does not fit."""
        return make_plan(
            self.config,
            len(machines),
            layers,
            groups=groups,
            shards=self.shards,
            machines=machines,
            dtype=self.dtype,
            quantization=self.quantization,
            cache_tokens=self.cache_tokens,
            most_cache_bytes=self.most_cache_bytes,
            cache_dtype=self.cache_dtype,
            vision_node=self.vision_node,
        )


@dataclass(frozen=True)
class Step:
    """The time of one batch in one stage. compute_s: of its slowest rank, with its part of a prompt.

    exchanges: of partial sums, two for each layer, with batch and logits of a group. exchange_s: of all of them.
    """

    compute_s: float
    exchanges: int = 0
    exchange_s: float = 0.0

    @property
    def total_s(self) -> float:
        return self.compute_s + self.exchange_s


@dataclass(frozen=True)
class Candidate:
    """A plan and its predicted time. hop_s: of all hops of one batch.

    token_s: seconds for each token of an answer: of one stream, or of all streams together.
    """

    plan: Plan
    steps: tuple[Step, ...]
    hop_s: float
    token_s: float

    @property
    def weighed_s(self) -> float:
        """What plans are ordered by: machines are left out for a gain that predictions can tell, and not for less."""
        return self.token_s if not self.plan.left_out else self.token_s / WORTHWHILE

    @property
    def exchanges(self) -> int:
        return sum(step.exchanges for step in self.steps)

    @property
    def exchange_s(self) -> float:
        return sum(step.exchange_s for step in self.steps)

    @property
    def compute_s(self) -> float:
        return sum(step.compute_s for step in self.steps)

    @property
    def grouped(self) -> bool:
        return max(self.plan.groups) > 1


@dataclass(frozen=True)
class Choice:
    """All plans that fit, the best first. optimize: what they are compared by."""

    candidates: tuple[Candidate, ...]
    optimize: Goal = "latency"

    @property
    def best(self) -> Candidate:
        return self.candidates[0]

    @property
    def runners_up(self) -> tuple[Candidate, ...]:
        return self.candidates[1:3]

    def name(self, candidate: Candidate) -> str:
        """In words: what is split how, and over what."""
        groups, left_out = candidate.plan.groups, candidate.plan.unused
        if candidate.plan.n_nodes == 1:
            return "starter alone"
        without = f" without {', '.join(left_out)}" if left_out else ""
        if not candidate.grouped:
            return f"layers over {len(groups)} nodes{without}"
        if len(groups) == 1:
            return f"a group of {groups[0]}{without}"
        return f"stages of {', '.join(map(str, groups))} nodes{without}"

    def reason(self, candidate: Candidate) -> str:
        """What makes it as fast as it is, or why it is not chosen though it is faster."""
        if candidate.token_s < self.best.token_s:
            return f"faster by less than a fifth: not enough to leave {', '.join(candidate.plan.unused)} out"
        if candidate.grouped:
            return self._exchanges_text(candidate)
        if candidate.plan.n_nodes == 1:
            return "one machine reads all weights, and nothing is sent"
        order = "one after the other" if self.optimize == "latency" else "each for a batch of its own"
        return f"the stages read their layers {order}; a batch's way between them takes {_ms(candidate.hop_s)} ms"

    @property
    def declined(self) -> str:
        """Why no group is chosen, in a sentence; empty where one is, or none is possible."""
        groups = [candidate for candidate in self.candidates if candidate.grouped]
        if self.best.grouped or not groups:
            return ""
        closest = groups[0]
        return f"{self.name(closest)} would take {_ms(closest.token_s)} ms a token: {self.reason(closest)}"

    def _exchanges_text(self, candidate: Candidate) -> str:
        each_s = candidate.exchange_s / candidate.exchanges
        text = f"{candidate.exchanges} exchanges of {_ms(each_s)} ms"
        if self.optimize == "throughput":
            return f"each step has {text}"
        saved_s = max(self._ungrouped_s - candidate.compute_s, 0.0)
        verb = "cost more than" if candidate.exchange_s > saved_s else "cost less than"
        return f"{text} {verb} the {_ms(saved_s)} ms that they save"

    @property
    def _ungrouped_s(self) -> float:
        """Computing in the best plan without groups."""
        ungrouped = [candidate for candidate in self.candidates if not candidate.grouped]
        return ungrouped[0].compute_s if ungrouped else math.inf


def choose(job: Job, machines: Sequence[Machine], links: Links) -> Choice:
    """The plans for these machines, the best first. machines: in pipeline order, the starter's first.

    Raises ConfigError where none fits, with what is missing.
    """
    candidates, refusal = list[Candidate](), ConfigError("a plan needs a machine")
    for left_out in _left_out(machines):
        used = [machine for place, machine in enumerate(machines) if place not in left_out]
        for groups in _groupings(len(used)):
            try:
                plan = replace(job.plan(used, groups), left_out=left_out)
            except ConfigError as error:
                refusal = error if not candidates and max(groups) == 1 else refusal
                continue
            candidates.append(predict(job, plan, machines, links))
    if not candidates:
        raise refusal
    return Choice(tuple(sorted(candidates, key=attrgetter("weighed_s"))), job.optimize)


def predict(job: Job, plan: Plan, machines: Sequence[Machine], links: Links) -> Candidate:
    """The time of a plan for these machines.

    One stream passes all stages, one after the other. Of many streams each stage has a batch at a time, as many batches
    as there are stages; the slowest stage gives the time, or the way of one batch through all, if that is longer.
    """
    rows = 1 if job.optimize == "latency" else max(1, job.streams // len(plan.groups))
    nodes, bounds = plan.places, list(pairwise([0, *accumulate(plan.groups)]))
    steps = tuple(
        _step(job, plan.stages[first:last], nodes[first:last], machines, links, rows) for first, last in bounds
    )
    leads = [nodes[first] for first, _ in bounds]
    hops = zip(leads, [*leads[1:], leads[0]], strict=True) if len(leads) > 1 else ()
    batch_bytes = rows * _row_bytes(job)
    hop_s = sum(HOP_S + _send_s(links.between(one, other), batch_bytes) for one, other in hops)
    round_s = sum(step.total_s for step in steps) + hop_s
    if job.optimize == "throughput":
        n_batches = min(len(steps), job.streams)
        round_s = max(round_s, n_batches * max(step.total_s for step in steps)) / (rows * n_batches)
    return Candidate(plan, steps, hop_s, round_s)


def _step(
    job: Job,
    specs: Sequence[StageSpec],
    nodes: Sequence[int],
    machines: Sequence[Machine],
    links: Links,
    rows: int,
) -> Step:
    compute_s = max(_compute_s(job, spec, machines[node], rows) for spec, node in zip(specs, nodes, strict=True))
    if len(specs) == 1:
        return Step(compute_s)
    link, lead = links.worst(nodes), specs[0].rank
    assert lead
    n_shards = lead.n_shards
    # a rank sends its shards to all others, and receives theirs
    shards = [len(spec.rank.shards) for spec in specs if spec.rank]
    most = max(max(own * (len(specs) - 1), n_shards - own) for own in shards)
    layers, row_bytes = len(specs[0].layers), _row_bytes(job)
    exchange_s = EXCHANGE_S + _send_s(link, most * rows * row_bytes)
    prompt_s = job.prompt_tokens * rows * most * row_bytes / link.bytes_per_s
    gather_bytes = (1 - len(lead.shards) / n_shards) * rows * job.config.vocab_size * row_bytes / job.config.hidden_size
    lead_s = EXCHANGE_S + _send_s(link, rows * row_bytes)
    gather_s = EXCHANGE_S + _send_s(link, gather_bytes) if specs[0].head else 0.0
    return Step(
        compute_s,
        exchanges=2 * layers + 1 + specs[0].head,
        exchange_s=2 * layers * (exchange_s + prompt_s) + lead_s + gather_s,
    )


def _compute_s(job: Job, spec: StageSpec, machine: Machine, rows: int) -> float:
    """Seconds of a rank for a decode step of so many rows, and for the part of prompts that goes with them.

    Reading and computing count both: kernels of few rows do not hide one behind the other.
    """
    parts = [(_ends(job, spec), 1), (_layer(job, spec, rows), len(spec.layers))]
    step_bytes = sum(count * part.step_bytes for part, count in parts)
    row_s = machine.prompt_token_s(sum(count * part.step_parameters for part, count in parts))
    return machine.token_s(step_bytes) + (1 + job.prompt_tokens) * rows * row_s


def _ends(job: Job, spec: StageSpec) -> StageSummary:
    ends = StageSpec(0, 0, spec.embedding, spec.vision, spec.head, spec.rank)
    return stage_summary(job.config, ends, job.dtype, quantization=job.quantization)


def _layer(job: Job, spec: StageSpec, rows: int) -> StageSummary:
    return layer_summary(job.config, job.dtype, quantization=job.quantization, rank=spec.rank, streams=rows)


def _row_bytes(job: Job) -> int:
    """Of one token's hidden state, or of its partial sum of one shard."""
    return TensorSpec((job.config.hidden_size,), job.dtype).size_bytes


def _send_s(link: LinkSpeed, n_bytes: float) -> float:
    return link.rtt_s / 2 + n_bytes / link.bytes_per_s


def _left_out(machines: Sequence[Machine]) -> Iterator[tuple[int, ...]]:
    """No machine, then the slowest, the two slowest, and so on. The starter stays."""
    others = sorted(range(1, len(machines)), key=lambda place: machines[place].bytes_per_s)
    for count in range(len(machines)):
        yield tuple(sorted(others[:count]))


def _groupings(n_nodes: int) -> Iterator[tuple[int, ...]]:
    """Ways to group neighbours: nodes of each stage. Layers over single nodes come first."""
    if n_nodes <= EVERY_SPLIT:
        yield from sorted(_compositions(n_nodes), key=max)
        return
    for size in range(1, min(n_nodes, MOST_RANKS) + 1):
        yield (size,) * (n_nodes // size) + ((n_nodes % size,) if n_nodes % size else ())


def _compositions(total: int) -> Iterator[tuple[int, ...]]:
    """Ordered ways to write a number as a sum: 3 is 1+1+1, 1+2, 2+1 and 3."""
    if total == 0:
        yield ()
    for first in range(1, total + 1):
        yield from ((first, *rest) for rest in _compositions(total - first))


def _ms(seconds: float) -> str:
    milliseconds = seconds * 1e3
    return f"{milliseconds:.2f}" if milliseconds < 10 else f"{milliseconds:,.0f}"
