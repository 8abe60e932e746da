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
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from mdi.core.outputs import Piece, Timing, Usage
from mdi.gateway.engine import Running, TextEngine
from mdi.gateway.engine_series import LABELS, EngineSeries

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_PLAIN_0_0_4
ENGINE = "0"  # the label of the only engine, as in vLLM; replicas have their names
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
        self._longest = self._histogram(
            "request_max_num_generation_tokens", "Tokens of the longest answer to a request.", tokens
        )
        self._queue = self._histogram("request_queue_time_seconds", "From a request to its first batch.", REQUEST_S)
        self._prefill = self._histogram(
            "request_prefill_time_seconds", "From a request's first batch to its first token.", REQUEST_S
        )
        self._decode = self._histogram(
            "request_decode_time_seconds", "From a request's first token to its last.", REQUEST_S
        )
        self._inference = self._histogram(
            "request_inference_time_seconds", "From a request's first batch to its last token.", REQUEST_S
        )
        self._queried = self._counter("prefix_cache_queries", "Tokens of prompts that were looked for in the cache.")
        self._hit = self._counter("prefix_cache_hits", "Tokens of prompts that an earlier sequence had computed.")
        self._finished = Counter(
            "vllm:request_success", "Answers by their end.", (*LABELS, "finished_reason"), registry=self._registry
        )
        for reason in ("stop", "length", "abort"):
            self._finished.labels(*self._labels, reason)
        self._registry.register(EngineSeries(engine, self._labels))
        self._registry.register(_Totals(self, self._labels))

    def text(self) -> str:
        """All series, in the text form."""
        return generate_latest(self._registry).decode()

    def observed(self, running: Running, began_s: float) -> Running:
        """The same request, whose tokens and times are counted. began_s: when it came, by time.monotonic."""
        return _Observed(running, self, began_s)

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

    def ended(self, usage: Usage, longest: int, timing: Timing, seconds: float) -> None:
        """A request that came to its own end. longest: tokens of its longest answer."""
        self._whole.observe(seconds)
        self._longest.observe(longest)
        self._observe_steps(timing)
        self._prompt.observe(usage.prompt_tokens)
        self._answer.observe(usage.completion_tokens)
        self.prompt_tokens += usage.prompt_tokens
        self._queried.inc(usage.prompt_tokens)
        self._hit.inc(usage.cached_tokens)

    def _observe_steps(self, timing: Timing) -> None:
        scheduled_s, first_s, last_s = timing.scheduled_s, timing.first_token_s, timing.last_token_s
        if scheduled_s is None or first_s is None or last_s is None:
            return
        self._queue.observe(scheduled_s - timing.arrived_s)
        self._prefill.observe(first_s - scheduled_s)
        self._decode.observe(last_s - first_s)
        self._inference.observe(last_s - scheduled_s)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        family = Histogram(f"vllm:{name}", text, LABELS, registry=self._registry, buckets=buckets)
        return family.labels(*self._labels)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"vllm:{name}", text, LABELS, registry=self._registry).labels(*self._labels)


class _Totals(Collector):
    """Tokens of all requests: plain numbers, because every piece of every answer adds to them."""

    def __init__(self, metrics: Metrics, labels: tuple[str, str]) -> None:
        self._metrics = metrics
        self._labels = labels

    def collect(self) -> Iterator[Metric]:
        for name, text, count in (
            ("prompt_tokens", "Tokens of prompts, of requests that came to their end.", self._metrics.prompt_tokens),
            ("generation_tokens", "Tokens of answers.", self._metrics.generated_tokens),
        ):
            family = CounterMetricFamily(f"vllm:{name}", text, labels=LABELS)
            family.add_metric(self._labels, count)
            yield family


class _Observed:
    """A running request whose pieces are counted and timed as they are taken."""

    def __init__(self, running: Running, metrics: Metrics, began_s: float) -> None:
        self._running = running
        self._metrics = metrics
        self._began_s = began_s
        self._last_s: dict[int, float] = {}  # of each sample
        self._tokens: dict[int, int] = {}  # of each sample
        self._ended = False

    @property
    def usage(self) -> Usage:
        return self._running.usage

    @property
    def timing(self) -> Timing:
        return self._running.timing

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
            self._tokens[piece.index] = self._tokens.get(piece.index, 0) + count
            self._metrics.generated(count)
        if piece.finish_reason:
            self._metrics.answered(piece.finish_reason)

    def _end(self) -> None:
        self._ended = True
        longest = max(self._tokens.values(), default=0)
        self._metrics.ended(self._running.usage, longest, self._running.timing, time.monotonic() - self._began_s)


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
