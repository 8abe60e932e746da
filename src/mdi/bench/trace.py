"""Writes runs as a trace for chrome://tracing and ui.perfetto.dev: a row for each kind of work of each node.

Format: "Trace Event Format", complete events (ph X), times in microseconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mdi.bench.measure import Run

ROWS = {
    "decode": 0,
    "prefill": 0,
    "sample": 0,
    "encode": 0,
    "fetch": 1,
    "preprocess": 1,
}  # media threads work beside the stage
PAUSE_S = 1.0  # between scenarios


def write_trace(path: Path, runs: Sequence[Run]) -> None:
    """Writes all runs, one after the other."""
    events, start_s = list[dict[str, Any]](), 0.0
    for run in runs:
        events += _events(run, start_s)
        start_s += run.seconds + PAUSE_S
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))


def _events(run: Run, start_s: float) -> Iterator[dict[str, Any]]:
    for process, (name, spans) in enumerate(run.nodes.items()):
        yield {"ph": "M", "name": "process_name", "pid": process, "args": {"name": name}}
        for span in spans:
            batch = {"batch": span.batch_id, "tokens": span.n_tokens} if span.batch_id >= 0 else {}
            yield _event(span.name, process, ROWS[span.name], start_s + span.start_s, span.seconds, batch)
    streams = len(run.nodes)
    yield {"ph": "M", "name": "process_name", "pid": streams, "args": {"name": "streams"}}
    for stream, times_s in enumerate(run.times_s):
        yield _event("until the first token", streams, stream, start_s, times_s[0], {"scenario": run.scenario.name})
        answer = {"scenario": run.scenario.name, "tokens": len(times_s)}
        yield _event("answer", streams, stream, start_s + times_s[0], times_s[-1] - times_s[0], answer)


def _event(name: str, process: int, row: int, start_s: float, seconds: float, args: dict[str, Any]) -> dict[str, Any]:
    return {
        "ph": "X",
        "name": name,
        "pid": process,
        "tid": row,
        "ts": start_s * 1e6,
        "dur": seconds * 1e6,
        "args": args,
    }
