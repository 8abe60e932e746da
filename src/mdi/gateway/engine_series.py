"""Series that the engine and its nodes are asked for when Prometheus asks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from mdi.core.histogram import Distribution
from mdi.core.status import CacheLayout, NodeStatus
from mdi.gateway.engine import TextEngine

LABELS = ("model_name", "engine")
LINK = (*LABELS, "from", "to")


class EngineSeries(Collector):
    """Of one engine. labels: the values of LABELS."""

    def __init__(self, engine: TextEngine, labels: tuple[str, str]) -> None:
        self._engine = engine
        self._labels = labels

    def collect(self) -> Iterator[Metric]:
        load, cache, recovery = self._engine.load, self._engine.cache, self._engine.recovery
        yield self._gauge("vllm:num_requests_running", "Requests that are computed.", load.running)
        yield self._gauge("vllm:num_requests_waiting", "Requests that wait.", load.waiting)
        yield self._gauge("vllm:kv_cache_usage_perc", "Part of the KV cache in use; 1 is all.", cache.used_share)
        yield self._counter("vllm:num_preemptions", "Sequences that lost their place in the cache.", cache.preemptions)
        yield self._gauge("mdi:recovering", "Whether lost nodes are brought back now.", recovery.recovering)
        yield self._counter("mdi:recoveries", "How often nodes were lost and brought back.", recovery.recoveries)
        yield self._counter("mdi:failed_requests", "Requests that ended with their nodes.", recovery.failed_requests)
        yield self._cache_config(self._engine.cache_layout)
        yield from self._measured()
        nodes = self._engine.nodes()
        yield from self._of_nodes(nodes)
        yield from self._of_links(nodes)

    def _cache_config(self, layout: CacheLayout) -> Metric:
        values = {
            "block_size": layout.block_tokens,
            "num_gpu_blocks": layout.n_blocks,
            "cache_dtype": layout.dtype,
            "enable_prefix_caching": True,
            "max_num_seqs": layout.max_sequences,
            "max_model_len": layout.sequence_length,
        }
        family = GaugeMetricFamily(
            "vllm:cache_config_info", "Blocks of the KV cache, on every node.", labels=(*LABELS, *values)
        )
        family.add_metric((*self._labels, *map(str, values.values())), 1)
        return family

    def _measured(self) -> Iterator[Metric]:
        found = self._engine.measurements
        yield self._histogram("vllm:iteration_tokens_total", "Tokens of each batch.", found.batch_tokens)
        yield self._counter("vllm:mm_cache_queries", "Images and videos that prompts showed.", found.media_queries)
        yield self._counter("vllm:mm_cache_hits", "Those that had been encoded before.", found.media_hits)
        yield self._histogram("mdi:vision_encode_seconds", "Of each image or video that was encoded.", found.encode_s)
        yield self._histogram("mdi:recovery_seconds", "From a loss until batches flow again.", found.recovery_s)
        yield self._counter("mdi:replayed_tokens", "Tokens computed again after losses.", found.replayed_tokens)

    def _of_nodes(self, nodes: Sequence[NodeStatus]) -> Iterator[Metric]:
        labels = (*LABELS, "node")
        up = GaugeMetricFamily("mdi:node_up", "Whether a node is ready.", labels=(*labels, "state"))
        busy = GaugeMetricFamily("mdi:node_busy_share", "Part of the time that a node computes.", labels=labels)
        resident = GaugeMetricFamily("mdi:node_resident_bytes", "Memory of a node's process.", labels=labels)
        sent = CounterMetricFamily("mdi:node_sent_bytes", "Over a node's links, since it started.", labels=labels)
        received = CounterMetricFamily(
            "mdi:node_received_bytes", "Over a node's links, since it started.", labels=labels
        )
        steps = SummaryMetricFamily("mdi:node_step_seconds", "Of the batches that a node computes.", labels=labels)
        for node in nodes:
            name = (*self._labels, _name(node))
            up.add_metric((*name, node.state), node.state == "ready")
            busy.add_metric(name, node.busy_share)
            resident.add_metric(name, node.resident_bytes)
            sent.add_metric(name, node.sent_bytes)
            received.add_metric(name, node.received_bytes)
            if node.group is not None:
                steps.add_metric(name, node.steps, node.step_s)
        yield from (up, busy, resident, sent, received, steps)

    def _of_links(self, nodes: Sequence[NodeStatus]) -> Iterator[Metric]:
        trip = GaugeMetricFamily("mdi:link_round_trip_seconds", "Of the last heartbeat.", labels=LINK)
        for node in nodes:
            if node.round_trip_s is not None:
                trip.add_metric((*self._labels, "starter", _name(node)), node.round_trip_s)
        carried = CounterMetricFamily("mdi:link_bytes", "Activations, results and patches over a link.", labels=LINK)
        for ends, count in link_bytes(nodes).items():
            carried.add_metric((*self._labels, *ends), count)
        yield from (trip, carried)

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=LABELS)
        family.add_metric(self._labels, value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(name, text, labels=LABELS)
        family.add_metric(self._labels, value)
        return family

    def _histogram(self, name: str, text: str, values: Distribution) -> Metric:
        family = HistogramMetricFamily(name, text, labels=LABELS)
        family.add_metric(self._labels, cumulated(values), values.total)
        return family


def cumulated(values: Distribution) -> list[tuple[str, float]]:
    """Buckets as Prometheus has them: each counts all values up to its bound."""
    buckets, count = list[tuple[str, float]](), 0
    for bound, more in zip((*map(float, values.bounds), float("inf")), values.counts, strict=True):
        count += more
        buckets.append(("+Inf" if bound == float("inf") else str(bound), count))
    return buckets


def link_bytes(nodes: Sequence[NodeStatus]) -> Mapping[tuple[str, str], int]:
    """Bytes over each link, by the nodes at its ends: round the pipeline, and to and from a vision node.

    Each is counted where it is received, but embeddings where they are sent: the starter counts results alone. What
    ranks of a group exchange is none of it.
    """
    ring = [node for node in nodes if node.group is not None and not node.rank]
    counts = dict[tuple[str, str], int]()
    if len(ring) > 1:
        counts |= {
            (_name(a), _name(b)): b.received_bytes - b.group_received_bytes for a, b in pairwise([*ring, ring[0]])
        }
    for node in nodes:
        if node.role == "vision":
            counts |= {("starter", _name(node)): node.received_bytes, (_name(node), "starter"): node.sent_bytes}
    return counts


def _name(node: NodeStatus) -> str:
    return node.name or node.spare
