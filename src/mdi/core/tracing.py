"""Spans: recorded times of a node's work. Off until a measurement starts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

MIN_SAMPLE_S = 0.5
MAX_SPANS = 50_000  # kept until they are taken; 2 MB as a message

SpanName = Literal["fetch", "preprocess", "encode", "prefill", "decode", "sample"]


@dataclass(frozen=True, slots=True)
class Span:
    """Work without a pause. start_s, end_s: of a clock with any origin. batch_id, n_tokens: of batches only."""

    name: SpanName
    start_s: float
    end_s: float
    batch_id: int = -1
    n_tokens: int = 0

    @property
    def seconds(self) -> float:
        return self.end_s - self.start_s


class Recorder:
    """Records spans from any thread, while `recording`."""

    def __init__(self) -> None:
        self.recording = False
        self._spans: list[Span] = []

    @contextmanager
    def span(self, name: SpanName, batch_id: int = -1, n_tokens: int = 0) -> Iterator[None]:
        """Records how long the body takes."""
        start_s = time.perf_counter()
        try:
            yield
        finally:
            if self.recording and len(self._spans) < MAX_SPANS:
                self._spans.append(Span(name, start_s, time.perf_counter(), batch_id, n_tokens))

    def take(self, recording: bool) -> list[Span]:
        """All spans since the last call. recording: whether to record more."""
        self.recording = recording
        taken, self._spans = self._spans, []
        return taken


class BusyMeter:
    """The share of the time that one thread spends inside `with meter:`. Another thread reads it."""

    def __init__(self) -> None:
        self._entered_s: float | None = None
        self._busy_s = 0.0
        self._sample = (time.perf_counter(), 0.0)  # time of the sample, and the busy seconds until then
        self._share = 0.0

    def __enter__(self) -> None:
        self._entered_s = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if self._entered_s is not None:
            self._busy_s += time.perf_counter() - self._entered_s
        self._entered_s = None

    def share(self) -> float:
        """Between 0 and 1, over the time since the last call, or half a second if that is longer."""
        entered_s, now = self._entered_s, time.perf_counter()
        since, before = self._sample
        if now - since >= MIN_SAMPLE_S:
            busy_s = self._busy_s + (now - entered_s if entered_s is not None else 0.0)
            self._share = min(1.0, max(0.0, (busy_s - before) / (now - since)))
            self._sample = (now, busy_s)
        return self._share
