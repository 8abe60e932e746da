"""GET /metrics: what requests and nodes do, as Prometheus reads it.

Names, labels and buckets of the `vllm:` series are vLLM's (vllm/v1/metrics/loggers.py), so that its dashboards and
alerts work; `mdi:` are our own.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from itertools import chain

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from mdi.core.outputs import Piece, Usage
from mdi.gateway.engine import Running, TextEngine

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_PLAIN_0_0_4
ENGINE = "0"  # the label of the only engine, as in vLLM; replicas have their names
LABELS = ("model_name", "engine")
FIRST_TOKEN_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0,
    640.0, 2560.0,
)  # fmt: skip
BETWEEN_TOKENS_S = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
REQUEST_S = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip

prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]  # vLLM's own server has no such series


class Metrics:
    """The series of one engine."""

    def __init__(self, engine: TextEngine, model_name: str, name: str = ENGINE) -> None:
        self.model_name = model_name
        self.prompt_tokens = 0  # of requests that came to their end
        self.generated_tokens = 0
        self._registry = CollectorRegistry()
        self._labels = (model_name, name)
        tokens = token_buckets(engine.capabilities.max_model_len)
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "From a request to its first token.", FIRST_TOKEN_S
        )
        self._between = self._histogram("inter_token_latency_seconds", "Between tokens of an answer.", BETWEEN_TOKENS_S)
        self._whole = self._histogram("e2e_request_latency_seconds", "From a request to its end.", REQUEST_S)
        self._prompt = self._histogram("request_prompt_tokens", "Tokens of prompts, media included.", tokens)
        self._answer = self._histogram("request_generation_tokens", "Tokens of all answers to a request.", tokens)
        self._queried = self._counter("prefix_cache_queries", "Tokens of prompts that were looked for in the cache.")
        self._hit = self._counter("prefix_cache_hits", "Tokens of prompts that an earlier sequence had computed.")
        self._finished = Counter(
            "vllm:request_success", "Answers by their end.", (*LABELS, "finished_reason"), registry=self._registry
        )
        for reason in ("stop", "length", "abort"):
            self._finished.labels(*self._labels, reason)
        self._registry.register(_EngineSeries(engine, self, self._labels))

    def text(self) -> str:
        """All series, in the text form."""
        return generate_latest(self._registry).decode()

    def observed(self, running: Running) -> Running:
        """The same request, whose tokens and times are counted."""
        return _Observed(running, self)

    def first_token(self, seconds: float) -> None:
        self._first_token.observe(seconds)

    def further_tokens(self, count: int, seconds: float) -> None:
        """So many, which came together after so long."""
        for _ in range(count):
            self._between.observe(seconds / count)

    def generated(self, count: int) -> None:
        self.generated_tokens += count

    def answered(self, reason: str) -> None:
        self._finished.labels(*self._labels, reason).inc()

    def ended(self, usage: Usage, seconds: float) -> None:
        """A request that came to its own end."""
        self._whole.observe(seconds)
        self._prompt.observe(usage.prompt_tokens)
        self._answer.observe(usage.completion_tokens)
        self.prompt_tokens += usage.prompt_tokens
        self._queried.inc(usage.prompt_tokens)
        self._hit.inc(usage.cached_tokens)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        family = Histogram(f"vllm:{name}", text, LABELS, registry=self._registry, buckets=buckets)
        return family.labels(*self._labels)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"vllm:{name}", text, LABELS, registry=self._registry).labels(*self._labels)


class _Observed:
    """A running request whose pieces are counted and timed as they are taken."""

    def __init__(self, running: Running, metrics: Metrics) -> None:
        self._running = running
        self._metrics = metrics
        self._began_s = time.monotonic()
        self._last_s: dict[int, float] = {}  # of each sample
        self._ended = False

    @property
    def usage(self) -> Usage:
        return self._running.usage

    async def __aiter__(self) -> AsyncIterator[Piece]:
        async for piece in self._running:
            self._count(piece)
            yield piece
        self._end()

    def cancel(self) -> None:
        """Also after the end, when it does nothing."""
        if not self._ended:
            self._ended = True
            self._metrics.answered("abort")
        self._running.cancel()

    def _count(self, piece: Piece) -> None:
        now, count = time.monotonic(), len(piece.tokens)
        if count:
            if not self._last_s:
                self._metrics.first_token(now - self._began_s)
            elif piece.index in self._last_s:
                self._metrics.further_tokens(count, now - self._last_s[piece.index])
            self._last_s[piece.index] = now
            self._metrics.generated(count)
        if piece.finish_reason:
            self._metrics.answered(piece.finish_reason)

    def _end(self) -> None:
        self._ended = True
        self._metrics.ended(self._running.usage, time.monotonic() - self._began_s)


class _EngineSeries(Collector):
    """What the engine and its nodes say of themselves, when it is asked for."""

    def __init__(self, engine: TextEngine, metrics: Metrics, labels: tuple[str, str]) -> None:
        self._engine = engine
        self._metrics = metrics
        self._labels = labels

    def collect(self) -> Iterator[Metric]:
        load, cache, recovery = self._engine.load, self._engine.cache, self._engine.recovery
        yield self._gauge("vllm:num_requests_running", "Requests that are computed.", load.running)
        yield self._gauge("vllm:num_requests_waiting", "Requests that wait.", load.waiting)
        yield self._gauge("vllm:kv_cache_usage_perc", "Part of the KV cache in use; 1 is all.", cache.used_share)
        yield self._counter("vllm:num_preemptions", "Sequences that lost their place in the cache.", cache.preemptions)
        yield self._counter("vllm:prompt_tokens", "Tokens of prompts.", self._metrics.prompt_tokens)
        yield self._counter("vllm:generation_tokens", "Tokens of answers.", self._metrics.generated_tokens)
        yield self._gauge("mdi:recovering", "Whether lost nodes are brought back now.", recovery.recovering)
        yield self._counter("mdi:recoveries", "How often nodes were lost and brought back.", recovery.recoveries)
        yield self._counter("mdi:failed_requests", "Requests that ended with their nodes.", recovery.failed_requests)
        yield from self._of_nodes()

    def _of_nodes(self) -> Iterator[Metric]:
        nodes = self._engine.nodes()
        labels = (*LABELS, "node")
        up = GaugeMetricFamily("mdi:node_up", "Whether a node is ready.", labels=(*labels, "state"))
        busy = GaugeMetricFamily("mdi:node_busy_share", "Part of the time that a node computes.", labels=labels)
        resident = GaugeMetricFamily("mdi:node_resident_bytes", "Memory of a node's process.", labels=labels)
        sent = CounterMetricFamily("mdi:node_sent_bytes", "Over a node's links, since it started.", labels=labels)
        received = CounterMetricFamily(
            "mdi:node_received_bytes", "Over a node's links, since it started.", labels=labels
        )
        trip = GaugeMetricFamily(
            "mdi:link_round_trip_seconds", "Of the last heartbeat.", labels=(*LABELS, "from", "to")
        )
        for node in nodes:
            name = (*self._labels, node.name or node.spare)
            up.add_metric((*name, node.state), node.state == "ready")
            busy.add_metric(name, node.busy_share)
            resident.add_metric(name, node.resident_bytes)
            sent.add_metric(name, node.sent_bytes)
            received.add_metric(name, node.received_bytes)
            if node.round_trip_s is not None:
                trip.add_metric((*self._labels, "starter", name[-1]), node.round_trip_s)
        yield from (up, busy, resident, sent, received, trip)

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=LABELS)
        family.add_metric(self._labels, value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(name, text, labels=LABELS)
        family.add_metric(self._labels, value)
        return family


def token_buckets(most: int) -> list[int]:
    """1, 2, 5, 10, 20, 50, ... up to `most`, as in vLLM."""
    return [
        bound for exponent in range(len(str(most))) for digit in (1, 2, 5) if (bound := digit * 10**exponent) <= most
    ]


class _Texts(Collector):
    """Families of several texts, each once."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = texts

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for family in chain.from_iterable(map(text_string_to_metric_families, self._texts)):
            if known := families.get(family.name):
                known.samples += family.samples
            else:
                families[family.name] = family
        yield from families.values()


def joined(texts: Iterable[str]) -> str:
    """The series of several engines as one text: each family once."""
    registry = CollectorRegistry()
    registry.register(_Texts(texts))
    return generate_latest(registry).decode()
