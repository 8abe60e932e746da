"""What GET /v1/nodes answers: the machines, the plan, requests and recovery. The page and `mdi cluster` read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from mdi import __version__
from mdi.gateway.engine import TextEngine
from mdi.gateway.metrics import Metrics

Report = dict[str, Any]
"""See `answer_types.Nodes`."""


def report(engine: TextEngine, metrics: Metrics, replica: str | None = None) -> Report:
    """Of one engine. replica: its name, where it is one of several."""
    of_replica = {} if replica is None else {"replica": replica}
    totals = {"prompt_tokens": metrics.prompt_tokens, "generated_tokens": metrics.generated_tokens}
    return {
        "model": metrics.model_name,
        "version": __version__,
        "nodes": [{**of_replica, **asdict(node)} for node in engine.nodes()],
        "plan": asdict(engine.plan),
        "requests": {**asdict(engine.load), **totals},
        "cache": asdict(engine.cache),
        **asdict(engine.recovery),
    }


def joined(reports: Sequence[Report]) -> Report:
    """Several replicas' reports as one: sums, and the fullest cache. Their plans may differ: the first one's stands."""
    first = reports[0]
    return {
        **first,
        "nodes": [node for report in reports for node in report["nodes"]],
        "requests": _sums([report["requests"] for report in reports]),
        "cache": {
            "used_share": max(report["cache"]["used_share"] for report in reports),
            "preemptions": sum(report["cache"]["preemptions"] for report in reports),
        },
        "recovering": any(report["recovering"] for report in reports),
        **_sums([{name: report[name] for name in ("recoveries", "failed_requests")} for report in reports]),
    }


def _sums(counts: Sequence[dict[str, int]]) -> dict[str, int]:
    return {name: sum(count[name] for count in counts) for name in counts[0]}
