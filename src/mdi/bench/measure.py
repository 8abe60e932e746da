"""Runs a scenario on an engine: the time of each token, and what every node did meanwhile."""

from __future__ import annotations

import asyncio
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise

from mdi.bench.scenario import Scenario
from mdi.core.tracing import Span, SpanName
from mdi.engine import Engine
from mdi.engine.stream import Stream

MEMORY_PERIOD_S = 0.25


@dataclass(frozen=True)
class Run:
    """One run of a scenario. times_s: for each stream, seconds from the start to each of its tokens.

    nodes: spans of each node, by name and on the same clock; none for a peer.
    """

    scenario: Scenario
    prompt_tokens: int
    times_s: tuple[tuple[float, ...], ...]
    nodes: dict[str, list[Span]] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return max(times[-1] for times in self.times_s)

    @property
    def first_token_s(self) -> float:
        """Median over the streams."""
        return statistics.median(times[0] for times in self.times_s)

    @property
    def inter_token_s(self) -> float:
        """Median over all tokens but the first ones; 0 where there are none."""
        gaps = [after - before for times in self.times_s for before, after in pairwise(times)]
        return statistics.median(gaps) if gaps else 0.0

    @property
    def decode_rate(self) -> float:
        """Tokens a second, all streams together, each from its first token on."""
        durations = [(len(times) - 1, times[-1] - times[0]) for times in self.times_s]
        return sum(tokens / seconds for tokens, seconds in durations if seconds > 0)

    @property
    def throughput(self) -> float:
        """Answer tokens a second, from the start to the last one."""
        return sum(map(len, self.times_s)) / self.seconds


@dataclass(frozen=True)
class NodeTime:
    """How a node spent its time. work_s: seconds by kind of work.

    hop_s: median time from the end of a batch in the node before to its start here, which is the link and the wait for
    this node together; None for the first.
    """

    work_s: dict[SpanName, float]
    idle_s: float
    hop_s: float | None


@dataclass
class MemoryLog:
    """Resident bytes of every node over time."""

    started_s: float
    times_s: list[float] = field(default_factory=list)
    resident_bytes: dict[str, list[int]] = field(default_factory=dict)

    def record(self, engine: Engine) -> None:
        self.times_s.append(time.perf_counter() - self.started_s)
        for node in engine.nodes():
            self.resident_bytes.setdefault(node.name, []).append(node.resident_bytes)


def measure(engine: Engine, scenario: Scenario, seed: int) -> Run:
    """Starts all streams at once and waits for the last. Raises what a stream raises."""
    prompts = scenario.prompts(seed)
    engine.spans(record=True)
    started_s = time.perf_counter()
    streams = [engine.submit(prompt, scenario.params) for prompt in prompts]

    async def times(stream: Stream) -> tuple[float, ...]:
        return tuple([token.time_s - started_s async for piece in stream for token in piece.tokens])

    async def all_times() -> list[tuple[float, ...]]:
        return await asyncio.gather(*map(times, streams))

    times_s = asyncio.run(all_times())
    nodes = {name: [shifted(span, -started_s) for span in spans] for name, spans in engine.spans(record=False).items()}
    return Run(
        scenario,
        max(stream.prompt_tokens for stream in streams),
        tuple(times_s),
        nodes,
    )


def shifted(span: Span, by_s: float) -> Span:
    return Span(span.name, span.start_s + by_s, span.end_s + by_s, span.batch_id, span.n_tokens)


def node_times(run: Run) -> dict[str, NodeTime]:
    """Time by kind of work of every node, in pipeline order."""
    result, before = dict[str, NodeTime](), dict[int, float]()
    for name, spans in run.nodes.items():
        work_s: dict[SpanName, float] = {}
        for span in spans:
            work_s[span.name] = work_s.get(span.name, 0.0) + span.seconds
        busy_s = sum(seconds for work, seconds in work_s.items() if work not in ("fetch", "preprocess"))
        hops = [span.start_s - before[span.batch_id] for span in spans if span.batch_id in before]
        result[name] = NodeTime(work_s, max(0.0, run.seconds - busy_s), statistics.median(hops) if hops else None)
        before = {span.batch_id: span.end_s for span in spans if span.batch_id >= 0}
    return result


@contextmanager
def memory_log(engine: Engine) -> Iterator[MemoryLog]:
    """Records every node's memory while the body runs."""
    log, ended = MemoryLog(time.perf_counter()), threading.Event()

    def watch() -> None:
        log.record(engine)
        while not ended.wait(MEMORY_PERIOD_S):
            log.record(engine)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield log
    finally:
        ended.set()
        thread.join()
