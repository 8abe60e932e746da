"""The same work in transformers, in this process: its own preprocessing, its own `generate`, greedy."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from mdi.bench.measure import Run
from mdi.bench.scenario import Scenario
from mdi.bench.verify import Oracle
from mdi.checkpoint.source import Source


class Transformers:
    """The checkpoint as its users run it there: streams that start together are one batch."""

    def __init__(self, source: Source, dtype: str) -> None:
        self._oracle = Oracle(source, dtype)

    def run(self, scenario: Scenario, seed: int) -> Run:
        """From messages to tokens, as `measure` does it here."""
        prompts = scenario.prompts(seed)
        started_s = time.perf_counter()
        times_s: list[float] = []

        def note(_ids: Tensor, _scores: Any, **_: Any) -> Tensor:
            times_s.append(time.perf_counter() - started_s)
            return torch.zeros(scenario.streams, dtype=torch.bool)

        n_prompt = self._oracle.generate(prompts, scenario.answer_tokens, note)
        return Run(scenario, n_prompt, (tuple(times_s),) * scenario.streams)
