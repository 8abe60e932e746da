"""OpenTelemetry traces: one for each request, with a span for each of its steps, sent to a collector in the background.

OpenTelemetry is an extra (`tracing`), and is imported only where an endpoint is given.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from mdi import __version__
from mdi.core.errors import ConfigError
from mdi.core.outputs import Timing, Usage

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

PATH = "/v1/traces"  # where collectors take them, unless the endpoint has another
TIMEOUT_S = 3.0  # for a collector to take some spans; a server that ends waits as long
NO_EXTRA = "--otlp-traces-endpoint needs OpenTelemetry: pip install 'mdi-llm[tracing]'"

Step = Literal["prompt", "encode", "queue", "prefill", "decode", "recovery"]


@dataclass(frozen=True)
class Phase:
    """A part of a request's time, by time.monotonic."""

    step: Step
    start_s: float
    end_s: float


@dataclass(frozen=True)
class TracedRequest:
    """A request that has ended. headers: those that may name its parent. timing, usage: of what it computed, if any.

    began_s, ended_s: by time.monotonic. status: of its answer; error: a later one, of an answer that had begun.
    """

    id: str
    route: str
    model: str
    headers: Mapping[str, str]
    began_s: float
    ended_s: float
    status: int
    error: int | None
    timing: Timing | None
    usage: Usage


class Traces:
    """Sends traces to the collector at an endpoint, OTLP over HTTP. Raises ConfigError without the extra."""

    def __init__(self, endpoint: str) -> None:
        exporter = exporter_to(endpoint)
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        name = os.environ.get("OTEL_SERVICE_NAME", "mdi")
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": name, "service.version": __version__})
        )  # ends with the process, and sends what it has
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("mdi", __version__)

    def add(self, request: TracedRequest, recoveries: Sequence[tuple[float, float]]) -> None:
        """recoveries: when each began and ended; those in the request's time become part of its trace."""
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        since_epoch_ns = time.time_ns() - time.monotonic_ns()

        def at(moment_s: float) -> int:
            return int(moment_s * 1e9) + since_epoch_ns

        root = self._tracer.start_span(
            "gateway",
            TraceContextTextMapPropagator().extract(request.headers),
            SpanKind.SERVER,
            _attributes(request),
            start_time=at(request.began_s),
        )
        if (request.error or request.status) >= 500:
            root.set_status(Status(StatusCode.ERROR))
        for phase in phases(request, recoveries):
            span = self._tracer.start_span(phase.step, set_span_in_context(root), start_time=at(phase.start_s))
            span.end(at(phase.end_s))
        root.end(at(request.ended_s))

    def flush(self) -> None:
        """Waits until all is sent, or cannot be."""
        self._provider.force_flush()

    def close(self) -> None:
        """Sends what is left, for some seconds at most."""
        self._provider.shutdown()


def exporter_to(endpoint: str) -> SpanExporter:
    """What sends to a collector. Raises ConfigError without the extra."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError:
        raise ConfigError(NO_EXTRA) from None
    url = endpoint if urlsplit(endpoint).path.strip("/") else endpoint.rstrip("/") + PATH
    return OTLPSpanExporter(url, timeout=TIMEOUT_S)


def phases(request: TracedRequest, recoveries: Sequence[tuple[float, float]]) -> Iterator[Phase]:
    """The steps that a request came to, the last one up to its end, and the recoveries in its time."""
    if request.timing is None:
        return
    yield from _steps(request.timing, request.ended_s)
    for start_s, end_s in recoveries:
        start_s, end_s = max(start_s, request.began_s), min(end_s, request.ended_s)
        if start_s < end_s:
            yield Phase("recovery", start_s, end_s)


def _steps(timing: Timing, ended_s: float) -> Iterator[Phase]:
    starts: list[tuple[Step, float | None]] = [
        ("prompt", timing.arrived_s),
        ("encode", timing.prepared_s if timing.encoded_s is not None else None),
        ("queue", timing.prepared_s if timing.encoded_s is None else timing.encoded_s),
        ("prefill", timing.scheduled_s),
        ("decode", timing.first_token_s),
    ]
    end_s = ended_s if timing.last_token_s is None else timing.last_token_s
    begun = [(step, start_s) for step, start_s in starts if start_s is not None]
    ends = [*(start_s for _, start_s in begun[1:]), end_s]
    for (step, start_s), next_s in zip(begun, ends, strict=True):
        yield Phase(step, start_s, next_s)


def _attributes(request: TracedRequest) -> dict[str, str | int]:
    """By OpenTelemetry's names, where it has some."""
    return {
        "http.request.method": "POST",
        "http.route": request.route,
        "http.response.status_code": request.status,
        "gen_ai.request.model": request.model,
        "gen_ai.usage.input_tokens": request.usage.prompt_tokens,
        "gen_ai.usage.output_tokens": request.usage.completion_tokens,
        "mdi.cached_tokens": request.usage.cached_tokens,
        "mdi.request_id": request.id,
    }
