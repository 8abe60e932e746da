"""`mdi plan`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from mdi.cli.options import (
    DEFAULTS,
    CheckpointOptions,
    KvCacheDtype,
    KvCacheGb,
    MaxSequences,
    Model,
    NodesOptions,
    QuantizationOptions,
    SequenceLength,
    grouped,
    parse_groups,
    parse_layers,
)
from mdi.cli.screen import err, out, say
from mdi.core.config import CacheSettings, ClusterConfig, ManualNodes
from mdi.core.quantization import ModelQuantization
from mdi.core.tables import UncutTable

if TYPE_CHECKING:
    from mdi.cluster.measure import MeasuredNode
    from mdi.cluster.nodes_config import NodesConfig
    from mdi.models.config import ExpertsConfig, ModelConfig, StageSpec
    from mdi.planning.choose import Choice, Goal, Links
    from mdi.planning.hardware import Machine
    from mdi.planning.plan import Plan
    from mdi.planning.predict import StageSummary


@grouped
def plan(
    model: Model,
    options: NodesOptions,
    formats: QuantizationOptions,
    checkpoint: CheckpointOptions,
    sequence_length: SequenceLength = None,
    max_sequences: MaxSequences = DEFAULTS.cache.max_sequences,
    kv_cache_gb: KvCacheGb = None,
    kv_cache_dtype: KvCacheDtype = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Show what would go to which node, and what each would hold, before anything is loaded.

    With --nodes-config, the machines of running nodes are measured, and the best plan by the times that are predicted
    is shown, with the two that come next, unless layers or groups are given.
    """
    from mdi.cluster.nodes_config import NodesConfig
    from mdi.models.parts import Parts
    from mdi.models.weights import log_unquantized
    from mdi.planning.cache import CacheNode, cache_budget, planned_bytes, planned_tokens
    from mdi.planning.choose import Job, Links, choose
    from mdi.planning.hardware import Machine
    from mdi.planning.plan import role_names
    from mdi.planning.predict import stage_summary

    source = checkpoint.open(model)
    config = source.model_config
    split = ClusterConfig(
        n_nodes=options.n_nodes,
        layers=parse_layers(options.layers),
        pipeline_parallel_size=options.pipeline_parallel_size,
        tensor_parallel_size=options.tensor_parallel_size,
        groups=parse_groups(options.groups),
        shards=options.shards,
        optimize=options.optimize,
    )
    n_nodes, layers, groups = split.n_nodes or 1, split.layers, split.group_sizes
    dtype = options.dtype or config.dtype
    quantization = formats.of(source)
    cache = CacheSettings(sequence_length, max_sequences, kv_cache_gb=kv_cache_gb, kv_cache_dtype=kv_cache_dtype)
    measured, links, vision_node = list["MeasuredNode"](), Links(), False
    if options.nodes_config:
        nodes = NodesConfig.read(options.nodes_config)
        nodes.check_layers(config.n_layers)
        n_nodes, vision_node = nodes.n_nodes, nodes.vision is not None
        layers, groups = layers or nodes.layers, groups or nodes.groups
        measured, links = _measure(nodes, options, dtype, quantization)
    machines = [node.machine for node in measured]
    job = Job(
        config,
        dtype,
        quantization,
        cast("Goal", split.optimize),
        streams=max_sequences,
        cache_tokens=planned_tokens(cache, config.max_positions),
        most_cache_bytes=planned_bytes(cache),
        cache_dtype=kv_cache_dtype,
        vision_node=vision_node,
        shards=split.shards,
    )
    choice = None if layers or groups or not machines else choose(job, machines, links)
    if choice:
        made, machines = choice.best.plan, [machines[place] for place in choice.best.plan.places]
    else:
        made = job.plan(machines or [Machine()] * n_nodes, groups or (1,) * n_nodes, layers)
    log_unquantized(config, quantization)
    sizes = [stage_summary(config, spec, dtype, quantization=quantization).size_bytes for spec in made.stages]
    rooms = [machine.memory_bytes for machine in machines] or [math.inf] * n_nodes
    nodes_left = [
        CacheNode(
            name, len(spec.layers), room - size, n_kv_heads=Parts.of(config, spec, quantization).config.n_kv_heads
        )
        for name, spec, room, size in zip(made.roles, made.stages, rooms, sizes, strict=False)  # vision has no layers
    ]
    budget = cache_budget(config, cache, dtype, nodes_left)
    rows = [
        (name, spec, stage_summary(config, spec, dtype, budget.tokens, quantization, kv_cache_dtype))
        for name, spec in made.roles.items()
    ]
    if as_json:
        say(json.dumps(_report(rows, made, choice), indent=2))
        return
    out.print(_machines_table(rows[: made.n_nodes], machines) if machines else _stages_table(rows))
    if config.experts:
        out.print(_experts_text(config, config.experts, dtype, quantization, max_sequences))
    if machines or kv_cache_gb:
        out.print(
            f"KV cache: {budget.tokens:,} tokens of all sequences together; one has {budget.sequence_length:,} at most"
        )
    for name, node in zip(role_names(n_nodes), measured, strict=False):
        if node.unknown:
            out.print(f"{name} was not measured, and is taken to be as fast as this machine: {node.unknown}")
    if choice:
        _print_choice(choice, links, n_nodes)


def _print_choice(choice: Choice, links: Links, n_nodes: int) -> None:
    """The best plan, those that come next, and why."""
    table = UncutTable("plan", "a token", "why", narrow=True)
    for candidate in (choice.best, *choice.runners_up):
        table.add_row(choice.name(candidate), f"{_brief(candidate.token_s * 1e3)} ms", choice.reason(candidate))
    out.print(table)
    if choice.declined:
        out.print(choice.declined)
    n_pairs = math.comb(n_nodes, 2)
    if n_pairs > len(links.known):
        which = f"{n_pairs - len(links.known)} of {n_pairs} links" if links.known else "The links between nodes"
        out.print(f"{which} could not be measured, and are taken to have round trips of 0.2 ms, and 1 Gb/s.")


def _report(rows: Sequence[tuple[str, StageSpec, StageSummary]], made: Plan, choice: Choice | None) -> dict[str, Any]:
    """The plan as JSON has it. plans: the choice and the runners-up; empty where nothing was measured, or all given."""
    plans = (choice.best, *choice.runners_up) if choice else ()
    return {
        "groups": made.groups,
        "layers": made.layers,
        "n_shards": made.n_shards,
        "nodes": [
            {"name": name, **asdict(spec), **asdict(summary), "memory_bytes": summary.memory_bytes}
            for name, spec, summary in rows
        ],
        "plans": [
            {
                "name": choice.name(plan),
                "groups": plan.plan.groups,
                "layers": plan.plan.layers,
                "token_s": plan.token_s,
                "why": choice.reason(plan),
            }
            for plan in plans
            if choice
        ],
        "declined": choice.declined if choice else "",
    }


def _measure(
    nodes: NodesConfig, options: NodesOptions, dtype: str, quantization: ModelQuantization
) -> tuple[list[MeasuredNode], Links]:
    from mdi.cluster.launchers.manual import starter_identity
    from mdi.cluster.measure import measure_reachable
    from mdi.rpc.tls import encryption_enabled

    manual = ManualNodes(certs=options.certs, insecure=options.insecure)
    identity = starter_identity(nodes, manual, encryption_enabled())
    device = nodes.starter.device or "cpu"
    with err.status("measuring the machines, one after the other"):
        return measure_reachable(nodes, identity, dtype, quantization, device)


def _experts_text(
    config: ModelConfig, experts: ExpertsConfig, dtype: str, quantization: ModelQuantization, streams: int
) -> str:
    from mdi.models.config import StageSpec
    from mdi.planning.predict import stage_summary

    everything = StageSpec.everything(config)
    one, many = (
        stage_summary(config, everything, dtype, quantization=quantization, streams=count).step_bytes
        for count in (1, streams)
    )
    return (
        f"each token chooses {experts.per_token} of {experts.count} experts: a step of one stream reads "
        f"{one / 1e6:,.0f} MB of weights, one of {streams} streams about {many / 1e6:,.0f} MB"
    )


def _stages_table(rows: Sequence[tuple[str, StageSpec, StageSummary]]) -> UncutTable:
    table = UncutTable("node", "layers", "holds", "parameters", "MB", "of a step", narrow=True)
    for name, spec, summary in rows:
        parts = [("embedding", spec.embedding), ("vision", spec.vision), ("LM head", spec.head)]
        table.add_row(
            name,
            _layers_text(spec),
            ", ".join(part for part, held in parts if held) or "-",
            f"{summary.parameters:,}",
            f"{summary.size_bytes / 1e6:,.0f}",
            f"{summary.step_share:.0%}",
        )
    return table


def _machines_table(rows: Sequence[tuple[str, StageSpec, StageSummary]], machines: Sequence[Machine]) -> UncutTable:
    """Once all nodes have work, a token takes the time of the slowest node; a single stream takes the sum of all."""
    columns = ("weights", "cache", "room", "reads", "computes", "a token", "1,000 of a prompt")
    table = UncutTable("node", "layers", *columns, narrow=True)
    for (name, spec, summary), machine in zip(rows, machines, strict=True):
        table.add_row(
            name,
            _layers_text(spec),
            f"{summary.size_bytes / 1e6:,.0f} MB",
            f"{summary.cache_bytes / 1e6:,.0f} MB",
            "?" if math.isinf(machine.memory_bytes) else f"{machine.memory_bytes / 1e9:,.1f} GB",
            f"{machine.bytes_per_s / 1e9:,.1f} GB/s",
            f"{machine.flops_per_s / 1e12:,.2f} TFLOP/s",
            f"{_brief(machine.token_s(summary.step_bytes) * 1e3)} ms",
            f"{_brief(machine.prompt_token_s(summary.step_parameters) * 1e3)} s",
        )
    return table


def _brief(value: float) -> str:
    """With no more digits than tell anything: 0.17, 152.6, 1,560."""
    return f"{value:,.2f}" if value < 10 else f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def _layers_text(spec: StageSpec) -> str:
    """The layers, and a rank's part of each: 0-27 (28), 2/5."""
    text = f"{spec.first_layer}-{spec.last_layer - 1} ({len(spec.layers)})"
    return f"{text}, {len(spec.rank.shards)}/{spec.rank.n_shards}" if spec.rank else text
