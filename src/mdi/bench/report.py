"""Results of `mdi bench`: tables for the screen, JSON and CSV for programs."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mdi.bench.measure import MemoryLog, Run, node_times
from mdi.core.status import NodeStatus
from mdi.core.tables import UncutTable
from mdi.models.config import ModelConfig, StageSpec
from mdi.planning.plan import VISION
from mdi.planning.predict import StageSummary, stage_summary

MB = 1e6


@dataclass(frozen=True)
class NodeMemory:
    """Bytes on one node: weights by component, the KV cache if every slot were full, and all that is resident."""

    node: str
    embedding: int
    vision: int
    layers: int
    head: int
    cache: int
    resident: int


@dataclass(frozen=True)
class Bench:
    """All that one `mdi bench` measured. peers: transformers' runs, one for each of `runs`, or none."""

    model: str
    dtype: str
    computes_with: str
    runs: tuple[Run, ...]
    peers: tuple[Run, ...]
    memory: tuple[NodeMemory, ...]
    memory_log: MemoryLog

    def tables(self) -> list[UncutTable]:
        """For the screen."""
        tables = [self._speed_table(), self._nodes_table(), self._memory_table()]
        return [*tables, self._ratio_table()] if self.peers else tables

    def as_json(self) -> dict[str, Any]:
        """All figures; times in seconds, memory in bytes."""
        peers: Sequence[Run | None] = self.peers or [None] * len(self.runs)
        return {
            "model": self.model,
            "dtype": self.dtype,
            "computes_with": self.computes_with,
            "scenarios": [
                {
                    **asdict(run.scenario),
                    **_figures(run),
                    "nodes": {name: asdict(times) for name, times in node_times(run).items()},
                    "transformers": _figures(peer) if peer else None,
                }
                for run, peer in zip(self.runs, peers, strict=True)
            ],
            "memory": [asdict(node) for node in self.memory],
            "memory_log": {"times_s": self.memory_log.times_s, "resident_bytes": self.memory_log.resident_bytes},
        }

    def write_json(self, path: Path) -> None:
        path.write_text(json.dumps(self.as_json(), indent=2) + "\n")

    def write_csv(self, path: Path) -> None:
        """A row for each token: scenario, stream, number, seconds since the start."""
        with path.open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["scenario", "stream", "token", "seconds"])
            for run in self.runs:
                for stream, times_s in enumerate(run.times_s):
                    rows.writerows(
                        (run.scenario.name, stream, token, f"{time_s:.6f}") for token, time_s in enumerate(times_s)
                    )

    def _speed_table(self) -> UncutTable:
        table = UncutTable(
            "work",
            "tokens seen",
            "first token",
            "between tokens",
            "tokens/s, decode",
            "tokens/s, in all",
            title=f"{self.model}, {self.dtype}, {self.computes_with} (work: streams x tokens + pixels)",
        )
        for run in self.runs:
            table.add_row(
                run.scenario.name,
                str(run.prompt_tokens),
                f"{run.first_token_s:.3f} s",
                f"{run.inter_token_s * 1e3:.1f} ms",
                f"{run.decode_rate:.1f}",
                f"{run.throughput:.1f}",
            )
        return table

    def _nodes_table(self) -> UncutTable:
        works = ("fetch", "preprocess", "encode", "prefill", "decode", "sample")
        columns = ("node", *works, "idle", "hop, ms")
        table = UncutTable(*columns, title="seconds of each node", narrow=True)
        for run in self.runs:
            table.add_row(run.scenario.name, style="bold")
            for name, times in node_times(run).items():
                hop = "-" if times.hop_s is None else f"{times.hop_s * 1e3:.2f}"
                spent = (_seconds(times.work_s[work]) if work in times.work_s else "-" for work in works)
                table.add_row(name, *spent, _seconds(times.idle_s), hop)
        return table

    def _memory_table(self) -> UncutTable:
        columns = ("embedding", "vision", "layers", "LM head", "KV cache, full", "resident")
        table = UncutTable("node", *columns, title="memory, MB")
        for node in self.memory:
            sizes = (node.embedding, node.vision, node.layers, node.head, node.cache, node.resident)
            table.add_row(node.node, *(f"{size / MB:,.0f}" for size in sizes))
        return table

    def _ratio_table(self) -> UncutTable:
        columns = ("work", "first token", "there", "ratio", "tokens/s, decode", "there", "ratio")
        table = UncutTable(*columns, title="here, and there: in transformers")
        for ours, theirs in zip(self.runs, self.peers, strict=True):
            table.add_row(
                ours.scenario.name,
                f"{ours.first_token_s:.3f} s",
                f"{theirs.first_token_s:.3f} s",
                f"{theirs.first_token_s / ours.first_token_s:.2f}x",
                f"{ours.decode_rate:.1f}",
                f"{theirs.decode_rate:.1f}",
                f"{ours.decode_rate / theirs.decode_rate:.2f}x" if theirs.decode_rate else "-",
            )
        return table


def node_memory(config: ModelConfig, nodes: Sequence[NodeStatus], cache_tokens: int) -> tuple[NodeMemory, ...]:
    """Memory of every node that holds weights. cache_tokens: of all slots together."""
    apart = any(node.name == VISION for node in nodes)
    return tuple(
        _memory_of(config, node, (node.name == VISION) if apart else not index, cache_tokens)
        for index, node in enumerate(nodes)
        if node.dtype
    )


def _memory_of(config: ModelConfig, node: NodeStatus, vision: bool, cache_tokens: int) -> NodeMemory:
    def summary(spec: StageSpec) -> StageSummary:
        return stage_summary(config, spec, node.dtype, cache_tokens, node.quantization)

    layers = summary(StageSpec(node.first_layer, node.last_layer, rank=node.shards))
    leads = node.shards is None or node.shards.leads
    first, last = leads and node.last_layer > node.first_layer == 0, node.last_layer == config.n_layers
    return NodeMemory(
        node.name,
        embedding=summary(StageSpec(0, 0, embedding=first)).size_bytes,
        vision=summary(StageSpec(0, 0, vision=vision)).size_bytes,
        layers=layers.size_bytes,
        head=summary(StageSpec(0, 0, head=last, rank=node.shards)).size_bytes,
        cache=layers.cache_bytes,
        resident=node.resident_bytes,
    )


def _seconds(seconds: float) -> str:
    return f"{seconds:.3f}" if seconds < 100 else f"{seconds:.1f}"


def _figures(run: Run) -> dict[str, Any]:
    return {
        "prompt_tokens_seen": run.prompt_tokens,
        "first_token_s": run.first_token_s,
        "inter_token_s": run.inter_token_s,
        "decode_tokens_per_s": run.decode_rate,
        "tokens_per_s": run.throughput,
        "seconds": run.seconds,
    }
