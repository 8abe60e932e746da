"""A made-up run of two streams on two nodes."""

from __future__ import annotations

from mdi.bench.measure import Run
from mdi.bench.scenario import Scenario
from mdi.core.tracing import Span

TWO = Scenario(streams=2, prompt_tokens=10, image_side=None, answer_tokens=3)
NODES = {
    "starter": [Span("encode", 0.0, 0.5), Span("prefill", 0.5, 0.7, 1, 20), Span("decode", 1.0, 1.1, 2, 2)],
    "finisher": [Span("prefill", 0.8, 0.9, 1, 20), Span("decode", 1.4, 1.5, 2, 2)],
}
RUN = Run(TWO, 12, ((1.0, 1.5, 2.0), (1.2, 1.4, 1.6)), NODES)
