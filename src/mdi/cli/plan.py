"""`mdi plan`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

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
    parse_layers,
)
from mdi.cli.screen import err, out
from mdi.core.config import CacheSettings, ManualNodes
from mdi.core.quantization import ModelQuantization
from mdi.core.tables import UncutTable

if TYPE_CHECKING:
    from mdi.cluster.measure import MeasuredNode
    from mdi.cluster.nodes_config import NodesConfig
    from mdi.models.config import ExpertsConfig, ModelConfig, StageSpec
    from mdi.planning.hardware import Machine
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
) -> None:
    """Show which layers would go to which node, and what each would hold, before anything is loaded.

    With --nodes-config, the machines of running nodes are measured, and each gets what it can carry.
    """
    from mdi.cluster.nodes_config import NodesConfig
    from mdi.models.weights import log_unquantized
    from mdi.planning.cache import CacheNode, cache_budget, planned_bytes, planned_tokens
    from mdi.planning.plan import make_plan
    from mdi.planning.predict import stage_summary

    source = checkpoint.open(model)
    config = source.model_config
    n_nodes, layers, dtype = options.n_nodes or 1, parse_layers(options.layers), options.dtype or config.dtype
    quantization = formats.of(source)
    cache = CacheSettings(sequence_length, max_sequences, kv_cache_gb=kv_cache_gb, kv_cache_dtype=kv_cache_dtype)
    measured, vision_node = list["MeasuredNode"](), False
    if options.nodes_config:
        nodes = NodesConfig.read(options.nodes_config)
        nodes.check_layers(config.n_layers)
        n_nodes, layers, vision_node = nodes.n_nodes, layers or nodes.layers, nodes.vision is not None
        measured = _measure(nodes, options, dtype, quantization)
    machines = [node.machine for node in measured]
    made = make_plan(
        config,
        n_nodes,
        layers,
        machines=machines,
        dtype=dtype,
        quantization=quantization,
        cache_tokens=planned_tokens(cache, config.max_positions),
        most_cache_bytes=planned_bytes(cache),
        cache_dtype=kv_cache_dtype,
        vision_node=vision_node,
    )
    log_unquantized(config, quantization)
    sizes = [stage_summary(config, spec, dtype, quantization=quantization).size_bytes for spec in made.stages]
    rooms = [machine.memory_bytes for machine in machines] or [math.inf] * n_nodes
    stages = zip(made.roles, made.layers, rooms, sizes, strict=False)  # a vision node has no layers
    nodes_left = [CacheNode(name, count, room - size) for name, count, room, size in stages]
    budget = cache_budget(config, cache, dtype, nodes_left)
    rows = [
        (name, spec, stage_summary(config, spec, dtype, budget.tokens, quantization, kv_cache_dtype))
        for name, spec in made.roles.items()
    ]
    out.print(_machines_table(rows[: made.n_nodes], machines) if machines else _stages_table(rows))
    if config.experts:
        out.print(_experts_text(config, config.experts, dtype, quantization, max_sequences))
    if machines or kv_cache_gb:
        out.print(
            f"KV cache: {budget.tokens:,} tokens of all sequences together; one has {budget.sequence_length:,} at most"
        )
    for name, node in zip(made.roles, measured, strict=False):
        if node.unknown:
            out.print(f"{name} was not measured, and is taken to be as fast as this machine: {node.unknown}")


def _measure(
    nodes: NodesConfig, options: NodesOptions, dtype: str, quantization: ModelQuantization
) -> list[MeasuredNode]:
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
    return f"{spec.first_layer}-{spec.last_layer - 1} ({len(spec.layers)})"
