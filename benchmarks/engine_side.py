"""An engine in a process of its own. Run by `benchmarks.sides`."""

from __future__ import annotations

import io
import os
import time
from pathlib import Path
from typing import Any

from PIL import Image
from skimage import data

from benchmarks import slow_links
from benchmarks.serve_side import serve
from mdi import Engine, SamplingParams
from mdi.bench.measure import measure
from mdi.bench.scenario import Scenario
from mdi.checkpoint.source import open_source
from mdi.core.cores import LIMIT

SETTLED_S = 4  # until idle nodes have given memory back, and have said so


class OurEngine:
    """settings: those of `Engine`. cores: how many of the machine's this process and its nodes may use; all if None.

    threads: of this process and of each of its nodes; as the engine chooses if None. line: the file of a
    `slow_links.Line` between the ranks of a group; None for the machine's own speed.
    """

    def __init__(
        self,
        path: str,
        settings: dict[str, Any],
        cores: int | None = None,
        threads: int | None = None,
        line: str | None = None,
    ) -> None:
        if cores:
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
        if threads:
            os.environ[LIMIT] = str(threads)
        if line:
            slow_links.use(Path(line))
        self._engine = Engine(path, **settings)
        self._config = open_source(Path(path)).model_config

    def resident_after_a_question(self) -> dict[str, int]:
        """Bytes of each node without the KV cache in use, some seconds after a question; about a picture, if it can."""
        parts: list[dict[str, Any]] = [{"type": "text", "text": "What is this?"}]
        if self._config.vision:
            parts.insert(0, {"type": "image", "image": photograph()})
        params = SamplingParams(max_tokens=16, temperature=0)
        usage = self._engine.chat([{"role": "user", "content": parts}], params).usage
        time.sleep(SETTLED_S)
        layer_bytes = (
            (usage.prompt_tokens + usage.completion_tokens) * self._config.n_kv_heads * self._config.head_dim * 4
        )
        return {
            node.name: node.resident_bytes - (node.last_layer - node.first_layer) * layer_bytes
            for node in self._engine.nodes()
        }

    def measured(self, streams: int, prompt_tokens: int, answer_tokens: int, seed: int) -> dict[str, float]:
        """Tokens a second of all streams together, and the median seconds to a first token."""
        run = measure(self._engine, Scenario(streams, prompt_tokens, None, answer_tokens), seed)
        return {"decode_rate": run.decode_rate, "first_token_s": run.first_token_s, "throughput": run.throughput}

    def sampled(self, samples: int, prompt_tokens: int, answer_tokens: int, seed: int) -> dict[str, float]:
        """Tokens a second of the samples of one prompt, from the request on: upstream's `n_samples`."""
        params = SamplingParams(n=samples, temperature=1, seed=seed, max_tokens=answer_tokens, ignore_eos=True)
        started_s = time.perf_counter()
        completion = self._engine.submit(_prompt(prompt_tokens, seed), params).completion()
        n_tokens = sum(len(sample.token_ids) for sample in completion.samples)
        return {"throughput": n_tokens / (time.perf_counter() - started_s)}

    def tokens(self, prompt_tokens: int, answer_tokens: int, seed: int) -> list[int]:
        """A greedy answer."""
        params = SamplingParams(temperature=0, max_tokens=answer_tokens, ignore_eos=True)
        return list(self._engine.submit(_prompt(prompt_tokens, seed), params).completion().token_ids)

    def close(self) -> None:
        self._engine.close()


def _prompt(n_tokens: int, seed: int) -> list[dict[str, Any]]:
    [prompt] = Scenario(1, n_tokens, None, 1).prompts(seed)
    return prompt


def photograph() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(data.astronaut()).resize((448, 448)).save(buffer, "PNG")
    return buffer.getvalue()


if __name__ == "__main__":
    serve(OurEngine)
