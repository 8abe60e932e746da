"""The exact Qwen2-VL-2B shape with random weights: memory of three nodes, and one node's speed against transformers.

    python -m benchmarks.fullsize            # 5 GB of disk, 12 GB of memory, some minutes
    python -m benchmarks.fullsize --tiny     # the same steps on a tiny model, in seconds

Speeds are medians of runs that alternate between both sides in one process.
"""

from __future__ import annotations

import argparse
import io
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from skimage import data
from testing.checkpoints import tiny_config
from torch import Tensor

from mdi import Engine, SamplingParams
from mdi.checkpoint.loader import load_source
from mdi.checkpoint.prepare import chunk_folder, prepare
from mdi.checkpoint.published import QWEN2_VL_2B
from mdi.checkpoint.random_weights import write_random_checkpoint
from mdi.checkpoint.source import open_source
from mdi.core.batch import Batch, Slice, Token, TokenSampling
from mdi.engine.engine import TOKEN_BUDGET
from mdi.models.decoder import EMBEDDING, LM_HEAD
from mdi.models.stage import Stage

GREEDY = TokenSampling(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, sample=0, position=0)
N_NODES = 3
IMAGE_SIDE = 448
TARGETS = {"image encode": 1.5, "prefill": 1.2, "decode": 1.45}
OF_BANDWIDTH = 0.8  # of the rate at which memory can be read, decode should reach
PROBE_BYTES, PROBES = 2**31, 5
console = Console()


@dataclass(frozen=True)
class Work:
    """Sizes of the measured work."""

    prompt_tokens: int
    decode_tokens: int
    runs: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("checkpoints"), help="where the random checkpoint is kept")
    parser.add_argument("--tiny", action="store_true", help="a tiny model instead, to try the benchmark itself")
    options = parser.parse_args()
    config, name = (tiny_config(torch_dtype="bfloat16"), "random-tiny") if options.tiny else (QWEN2_VL_2B, "random-2b")
    work = Work(64, 4, 2) if options.tiny else Work(2000, 12, 3)
    path = options.folder / name
    if not (path / "config.json").exists():
        console.print(f"writing {path}")
        write_random_checkpoint(path, config, std=0.02)
    measure_memory(path)
    measure_speed(path, work)


def photograph() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(data.astronaut()).resize((IMAGE_SIDE, IMAGE_SIDE)).save(buffer, "PNG")
    return buffer.getvalue()


def measure_memory(path: Path) -> None:
    """Prints the memory of each of three nodes after a question about a picture."""
    folder = chunk_folder(path, N_NODES)
    if not folder.exists():
        prepare(open_source(path), N_NODES, dtype="bfloat16")
    question = [
        {
            "role": "user",
            "content": [{"type": "image", "image": photograph()}, {"type": "text", "text": "What is this?"}],
        }
    ]
    with Engine(path, n_nodes=N_NODES, dtype="bfloat16") as engine:
        started = time.perf_counter()
        answer = engine.chat(question, SamplingParams(max_tokens=16, temperature=0))
        seconds = time.perf_counter() - started
        nodes = engine.nodes()
    table = Table(
        "node",
        "layers",
        "chunk MB",
        "resident MB",
        "above the chunk MB",
        title=f"{N_NODES} nodes, target: 400 above",
    )
    for node in nodes:
        chunk = (folder / f"model_{node.name}.safetensors").stat().st_size
        extra = node.resident_bytes - chunk
        table.add_row(
            node.name,
            f"{node.first_layer}-{node.last_layer - 1}",
            f"{chunk / 1e6:,.0f}",
            f"{node.resident_bytes / 1e6:,.0f}",
            f"{extra / 1e6:,.0f}{'' if extra < 400e6 else '  MISSED'}",
        )
    console.print(table)
    console.print(
        f"{answer.usage.prompt_tokens} prompt tokens and {len(answer.token_ids)} answer tokens in {seconds:.1f} s\n"
    )


def measure_speed(path: Path, work: Work) -> None:
    """Prints the speeds of one node and of transformers, run in turns."""
    with torch.inference_mode():
        ours, theirs = Ours(path, work), Theirs(path)
        table = Table(
            "work",
            "transformers",
            "here",
            "ratio",
            "target",
            title=f"bfloat16, {torch.get_num_threads()} threads",
        )
        side = IMAGE_SIDE // 14
        rows = torch.randn(side * side, 1176)
        a, b = in_turns(lambda: theirs.encode(rows, side), lambda: ours.encode(rows, side), work.runs)
        table.add_row(*row("image encode", a, b, f"{a:.2f} s", f"{b:.2f} s"))
        ids = torch.randint(0, theirs.vocab_size - 1, (work.prompt_tokens,))
        a, b = in_turns(lambda: theirs.prefill(ids), lambda: ours.prefill(ids), work.runs)
        table.add_row(
            *row("prefill", a, b, f"{work.prompt_tokens / a:.1f} tok/s", f"{work.prompt_tokens / b:.1f} tok/s")
        )
        a, b = in_turns(lambda: theirs.decode(work.decode_tokens), lambda: ours.decode(work.decode_tokens), work.runs)
        table.add_row(
            *row("decode", a, b, f"{work.decode_tokens / a:.2f} tok/s", f"{work.decode_tokens / b:.2f} tok/s")
        )
    console.print(table)
    read, limit = weight_bytes(path) * work.decode_tokens / b, read_rate()
    share = read / limit
    console.print(
        f"decode reads {read / 1e9:.1f} GB/s of weights, {share:.2f} of the {limit / 1e9:.1f} GB/s that memory gives; "
        f"target {OF_BANDWIDTH} {'met' if share >= OF_BANDWIDTH else 'MISSED'}"
    )


def weight_bytes(path: Path) -> int:
    """Of the bfloat16 weights that every token needs: all layers and the LM head."""
    source = open_source(path)
    used = [name for name in source.names() if name.startswith("model.layers.")]
    head = LM_HEAD if LM_HEAD in source.names() else EMBEDDING
    return 2 * sum(prod(source.spec(name).shape) for name in (*used, head))


def read_rate() -> float:
    """Bytes a second that all threads together read from memory at best."""
    probe = torch.ones(PROBE_BYTES // 4)
    seconds = []
    for _ in range(PROBES):
        started = time.perf_counter()
        probe.sum()
        seconds.append(time.perf_counter() - started)
    return PROBE_BYTES / min(seconds)


def row(name: str, theirs_s: float, ours_s: float, theirs: str, ours: str) -> tuple[str, ...]:
    ratio, target = theirs_s / ours_s, TARGETS[name]
    return name, theirs, ours, f"{ratio:.2f}x", f"{target}x {'met' if ratio >= target else 'MISSED'}"


def in_turns(first: Callable[[], Any], second: Callable[[], Any], runs: int) -> tuple[float, float]:
    """Median seconds of both, after one run of each that is not counted."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for counted in [False] + [True] * runs:
        for call, results in zip((first, second), seconds, strict=True):
            started = time.perf_counter()
            call()
            if counted:
                results.append(time.perf_counter() - started)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


class Theirs:
    """transformers with its defaults: sdpa attention, KV cache, logits of the last position only."""

    def __init__(self, path: Path) -> None:
        from transformers import Qwen2VLForConditionalGeneration

        self.model = Qwen2VLForConditionalGeneration.from_pretrained(path, dtype=torch.bfloat16).eval()
        self.vocab_size: int = self.model.config.text_config.vocab_size
        self.cache: Any = None

    def encode(self, rows: Tensor, side: int) -> None:
        self.model.model.visual(rows.bfloat16(), grid_thw=torch.tensor([[1, side, side]]))

    def prefill(self, ids: Tensor) -> None:
        self.cache = self.model(input_ids=ids[None], use_cache=True, logits_to_keep=1).past_key_values

    def decode(self, n_tokens: int) -> None:
        token = torch.tensor([[5]])
        for _ in range(n_tokens):
            out = self.model(input_ids=token, past_key_values=self.cache, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)


class Ours:
    """One stage with the whole model."""

    def __init__(self, path: Path, work: Work) -> None:
        length = work.prompt_tokens + work.decode_tokens * (work.runs + 1)
        loaded = load_source(open_source(path), dtype="bfloat16")
        self.stage = Stage(loaded, n_slots=1, sequence_length=length)
        self.length = 0

    def encode(self, rows: Tensor, side: int) -> None:
        for _ in self.stage.encode_steps(rows, (1, side, side)):
            pass

    def prefill(self, ids: Tensor) -> None:
        """In batches as large as the engine makes them."""
        self.length = 0
        *first, last = torch.split(ids, TOKEN_BUDGET)
        for chunk in first:
            self._step(chunk, samples=False)
        self._step(last)

    def decode(self, n_tokens: int) -> None:
        token = 5
        for _ in range(n_tokens):
            token = self._step(torch.tensor([token]))[0].id

    def _step(self, ids: Tensor, *, samples: bool = True) -> tuple[Token, ...]:
        positions = torch.arange(self.length, self.length + len(ids)).expand(3, -1)
        batch = Batch(0, (Slice(0, self.length, len(ids), (GREEDY,) * samples),), positions)
        self.length += len(ids)
        return self.stage.sample(batch, self.stage.run(batch, self.stage.embed(ids))).tokens


if __name__ == "__main__":
    main()
