"""Runs as a trace."""

from __future__ import annotations

import json
from pathlib import Path

from mdi.bench.trace import write_trace
from tests.bench.runs import RUN


def test_a_trace_has_every_span_of_every_node(tmp_path: Path) -> None:
    write_trace(tmp_path / "trace.json", [RUN, RUN])
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X" and event["pid"] < 2]
    assert len(spans) == 2 * 5
    assert {event["args"]["name"] for event in events if event["ph"] == "M"} == {"starter", "finisher", "streams"}
    decode = [event for event in spans if event["name"] == "decode"]
    assert decode[0] | {"ts": 0} == decode[2] | {"ts": 0}
    assert decode[2]["ts"] - decode[0]["ts"] > RUN.seconds * 1e6  # one after the other
