"""Agents with long conversations in turns, in a KV cache for a part of them: answers, recomputed tokens, memory.

    python -m benchmarks.agents                    # 16 agents of 8,000 tokens in memory for a quarter of that
    python -m benchmarks.agents --tokens 1000      # the same in short

Each turn adds a question to every conversation, and all agents ask at once. A small random model with a large KV cache
answers. Exit code 1 when answers are not those of one agent after the other, or memory grows beyond the limit.
"""

from __future__ import annotations

import argparse
import random
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
from rich.console import Console
from rich.table import Table
from testing.checkpoints import tiny_text_config

from mdi import Engine, SamplingParams
from mdi.checkpoint.random_weights import write_random_checkpoint
from mdi.checkpoint.source import open_source
from mdi.core.messages import TokenIds
from mdi.planning.cache import token_bytes

TURNS = 4
ANSWER = 32
SLACK_BYTES = 64e6  # what else the process takes while it answers
GREEDY = SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True)


@dataclass(frozen=True)
class Agents:
    """count conversations of `tokens` tokens at their end. share: of all of them, that memory is for."""

    count: int = 16
    tokens: int = 8000
    share: float = 0.25

    def question(self, agent: int, turn: int) -> list[int]:
        rng = random.Random(100 * agent + turn)
        return [rng.randrange(250) for _ in range(self.tokens // TURNS - ANSWER)]


@dataclass(frozen=True)
class Outcome:
    """answers: token ids by agent and turn. computed: tokens of prompts that were not in the cache. seconds: in all.

    grown_bytes: the most that this process grew by.
    """

    answers: list[list[tuple[int, ...]]]
    computed: int
    preemptions: int
    seconds: float
    grown_bytes: int
    budget_bytes: int


def run(path: Path, agents: Agents, dtype: str, *, together: bool, kv_cache_gb: float | None = None) -> Outcome:
    """All turns of all agents. together: all ask at once; otherwise the first has all its turns, then the second."""
    n_slots = agents.count if together else 1
    length = agents.tokens + 64
    engine = Engine(path, dtype=dtype, kv_cache_gb=kv_cache_gb, sequence_length=length, max_sequences=n_slots)
    with engine, Watch() as watch:
        started_s = time.perf_counter()
        talks = [list[int]() for _ in range(agents.count)]
        answers = [list[tuple[int, ...]]() for _ in range(agents.count)]
        computed = 0
        everybody = range(agents.count)
        groups = [everybody] * TURNS if together else [[agent] for agent in everybody for _ in range(TURNS)]
        for group in groups:
            for agent in group:
                talks[agent] += agents.question(agent, len(answers[agent]))
            streams = [engine.submit(TokenIds(tuple(talks[agent])), GREEDY) for agent in group]
            for agent, stream in zip(group, streams, strict=True):
                done = stream.completion()
                answers[agent].append(done.token_ids)
                talks[agent] += done.token_ids
                computed += done.usage.prompt_tokens - done.usage.cached_tokens
        seconds = time.perf_counter() - started_s
        tokens, model = engine._cluster.cache.tokens, engine._cluster.stage.config
        budget = tokens * token_bytes(model, dtype, model.n_layers)
        return Outcome(answers, computed, engine._loop._scheduler.preemptions, seconds, watch.grown_bytes, budget)


class Watch:
    """The most that this process's memory grows by."""

    def __enter__(self) -> Watch:
        self._process = psutil.Process()
        self._before = self._process.memory_info().rss
        self.grown_bytes = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(0.02):
            self.grown_bytes = max(self.grown_bytes, self._process.memory_info().rss - self._before)


def wide_checkpoint(folder: Path) -> Path:
    """A small random model whose KV cache is large: 4 KB a token in float32, in two layers."""
    sizes = {"hidden_size": 256, "num_attention_heads": 16, "num_key_value_heads": 16, "num_hidden_layers": 2}
    return write_random_checkpoint(folder, tiny_text_config(max_position_embeddings=32_768, **sizes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agents", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=8000, help="of each conversation at its end")
    parser.add_argument("--share", type=float, default=0.25, help="of all conversations that there is memory for")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    agents = Agents(options.agents, options.tokens, options.share)
    with TemporaryDirectory(prefix="mdi-agents-") as folder:
        path = wide_checkpoint(Path(folder) / "wide")
        model = open_source(path).model_config
        each = token_bytes(model, options.dtype, model.n_layers)
        limit_gb = agents.count * agents.tokens * agents.share * each / 1e9
        alone = run(path, agents, options.dtype, together=False)
        together = run(path, agents, options.dtype, together=True, kv_cache_gb=limit_gb)
    table = Table("", "prompt tokens computed", "preempted", "seconds", "memory grew by", "KV cache at most")
    for name, done in (("one after the other", alone), ("together", together)):
        table.add_row(
            name,
            f"{done.computed:,}",
            str(done.preemptions),
            f"{done.seconds:.1f}",
            f"{done.grown_bytes / 1e6:,.0f} MB",
            f"{done.budget_bytes / 1e6:,.0f} MB",
        )
    console = Console()
    console.print(table)
    differing = sum(theirs != ours for theirs, ours in zip(alone.answers, together.answers, strict=True))
    console.print(f"answers that differ from those alone: {differing} of {agents.count}")
    sys.exit(differing > 0 or together.grown_bytes > together.budget_bytes + SLACK_BYTES)


if __name__ == "__main__":
    main()
