"""Many streams at once on the exact Qwen2-VL-2B shape: what they cost each other. Random weights, one machine.

16 streams are compared with the roofline of memory and arithmetic, in each numeric type; the rest is in bfloat16, but
for two nodes, which are in int4.

    python -m benchmarks.streams                  # 5 GB of disk, 12 GB of memory, some ten minutes
    python -m benchmarks.streams --tiny           # the same steps on a tiny model, in seconds
    python -m benchmarks.streams --only image     # of what has "image" in its name

Every figure is a ratio of two runs in one process, or of two that alternate.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table
from testing.links import free_port
from testing.manual_cluster import LOOPBACK, ManualCluster, Place

from benchmarks.formats import FORMATS, Format, engine_settings, random_checkpoint, token_bytes, token_operations
from benchmarks.nodes import chunks_of
from benchmarks.sides import Side
from mdi import Engine, SamplingParams
from mdi.bench.measure import Run, measure
from mdi.bench.scenario import Scenario, noise
from mdi.core.cores import usable_cores
from mdi.engine.stream import Stream
from mdi.kernels.threads import computes_with

SEQUENCE_LENGTH = 2048
console = Console()


@dataclass(frozen=True)
class Sizes:
    """Sizes of the work. image_side: of a usual image. large: width and height of a photograph of 12 megapixels."""

    prompt_tokens: int = 64
    answer_tokens: int = 24
    image_side: int = 448
    large: tuple[int, int] = (4032, 3024)
    runs: int = 2


TINY = Sizes(16, 8, 112, (1280, 960), 1)


@dataclass(frozen=True)
class Figure:
    """A ratio, the least that it should be (None: it is only reported), and the numbers behind it."""

    work: str
    ratio: float
    target: float | None
    behind: str

    @property
    def verdict(self) -> str:
        if self.target is None:
            return ""
        return f"{self.target} {'met' if self.ratio >= self.target else 'MISSED'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("checkpoints"), help="where the random checkpoint is kept")
    parser.add_argument("--tiny", action="store_true", help="a tiny model instead, to try the benchmark itself")
    parser.add_argument("--only", default="", help="part of the names of what to measure")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    sizes = TINY if options.tiny else Sizes()
    path = random_checkpoint(options.folder, "tiny" if options.tiny else "2b")
    if options.worker:
        work_on_cores(path, sizes, options.worker)
        return
    table = Table("work", "ratio", "target", "behind it", title=f"{path.name}, {computes_with()}")
    for figure in figures(path, sizes, options.only):
        table.add_row(figure.work, f"{figure.ratio:.2f}", figure.verdict, figure.behind)
        console.print(f"{figure.work}: {figure.ratio:.2f} ({figure.behind})")
    console.print(table)


def figures(path: Path, sizes: Sizes, only: str) -> Iterator[Figure]:
    """The figures with `only` in their names."""
    in_engine: dict[str, Callable[[Engine, Sizes], Figure]] = {
        "decode with an image in the context against without": image_in_context,
        "first token of a first question about an image against a second": second_question,
        "8 streams while a large image is encoded against undisturbed": during_an_encode,
    }
    chosen = {name: measured for name, measured in in_engine.items() if only in name}
    if chosen:
        with engine_of(path, FORMATS["bf16"]) as engine:
            measure(engine, Scenario(1, sizes.prompt_tokens, 56, 2), seed=0)
            for measured in chosen.values():
                yield measured(engine, sizes)
    for name, format_ in FORMATS.items():
        if only in f"16 streams in {name} against the roofline":
            yield sixteen_streams(path, sizes, format_)
    if only in "two nodes of one core against one node of one core":
        yield two_nodes(path, sizes)


def engine_of(path: Path, format_: Format) -> Engine:
    settings = engine_settings(format_)
    return Engine(path, dtype="bfloat16", sequence_length=SEQUENCE_LENGTH, max_sequences=16, **settings)


def sixteen_streams(path: Path, sizes: Sizes, format_: Format) -> Figure:
    """Against the longer of two times: to read the weights once, and to multiply with them 16 times."""
    with engine_of(path, format_) as engine, Side("benchmarks.roofline", threads=usable_cores()) as roofline:
        one, many = (
            median_run(engine, Scenario(streams, sizes.prompt_tokens, None, sizes.answer_tokens), sizes).decode_rate
            for streams in (1, 16)
        )
        read_rate = float(roofline.value("read_rate"))
        kind = "int8" if format_.quantization.layers else "bf16"
        operation_rate = float(roofline.value("operation_rate", kind=kind))
    read_s = token_bytes(path, format_) / read_rate
    compute_s = 16 * token_operations(path, format_) / operation_rate
    behind = f"{many:.1f} tokens/s, one stream {one:.1f}; {read_rate / 1e9:.1f} GB/s, {operation_rate / 1e12:.2f} Tops"
    return Figure(f"16 streams in {format_.name} against the roofline", many * max(read_s, compute_s) / 16, 0.8, behind)


def image_in_context(engine: Engine, sizes: Sizes) -> Figure:
    without, with_image = (
        median_run(engine, Scenario(1, sizes.prompt_tokens, side, sizes.answer_tokens), sizes)
        for side in (None, sizes.image_side)
    )
    behind = f"{with_image.decode_rate:.2f} and {without.decode_rate:.2f} tokens/s"
    return Figure("decode with an image in the context", with_image.decode_rate / without.decode_rate, 0.95, behind)


def second_question(engine: Engine, sizes: Sizes) -> Figure:
    image = noise(sizes.image_side, np.random.default_rng(7))
    seconds = []
    for question in ("What is in this picture?", "Where was it taken, do you think?"):
        parts = [{"type": "image", "image": image}, {"type": "text", "text": question}]
        stream = engine.submit([{"role": "user", "content": parts}], SamplingParams(temperature=0, max_tokens=1))
        started_s = time.perf_counter()
        [piece] = list(stream)
        seconds.append(piece.tokens[0].time_s - started_s)
    first_s, second_s = seconds
    behind = f"{first_s:.2f} s and {second_s:.2f} s"
    return Figure("first token of a second question about an image", first_s / second_s, 5, behind)


def during_an_encode(engine: Engine, sizes: Sizes) -> Figure:
    """Token rate of 8 streams before an image comes and while it is encoded; and how long that takes."""
    photograph = io.BytesIO()
    width, height = sizes.large
    Image.fromarray(np.random.default_rng(5).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(
        photograph, "JPEG"
    )
    seeing: list[dict[str, Any]] = [{"role": "user", "content": [{"type": "image", "image": photograph.getvalue()}]}]
    # Sampled: a random model repeats its likeliest tokens, and where they make no characters no text ever comes.
    endless = SamplingParams(temperature=1, seed=3, ignore_eos=True)
    prompts = Scenario(8, sizes.prompt_tokens, None, 1).prompts(seed=3)
    streams = [engine.submit(prompt, endless) for prompt in prompts]
    times = Times(streams)
    times.wait_for(8 * 4)
    undisturbed_s = time.perf_counter()
    times.wait_for(times.count + 8 * sizes.answer_tokens)
    until_s = time.perf_counter()
    together_s = encode_s(engine, seeing)
    ended_s = time.perf_counter()
    for stream in streams:
        stream.cancel()
    times.join()
    photograph.write(b" ")  # another image, as far as caches know
    alone: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "image", "image": flipped(photograph.getvalue())}]}
    ]
    alone_s = encode_s(engine, alone)
    before, during = times.rate(undisturbed_s, until_s), times.rate(ended_s - together_s, ended_s)
    behind = f"{during:.1f} and {before:.1f} tokens/s; encoded in {together_s:.1f} s, alone in {alone_s:.1f} s"
    return Figure("8 streams while a large image is encoded", during / before, 0.5, behind)


def encode_s(engine: Engine, messages: list[dict[str, Any]]) -> float:
    """Seconds from the first part of the image's encoding to its last."""
    engine.spans(record=True)
    engine.chat(messages, SamplingParams(max_tokens=1))
    spans = [span for span in engine.spans(record=False)["starter"] if span.name == "encode"]
    return spans[-1].end_s - spans[0].start_s


def flipped(jpeg: bytes) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(jpeg)).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(buffer, "JPEG")
    return buffer.getvalue()


class Times:
    """When each token of some streams came, noted in threads of their own until the streams end."""

    def __init__(self, streams: list[Stream]) -> None:
        self._times_s: list[float] = []
        self._threads = [threading.Thread(target=self._follow, args=(stream,), daemon=True) for stream in streams]
        for thread in self._threads:
            thread.start()

    @property
    def count(self) -> int:
        return len(self._times_s)

    def wait_for(self, count: int) -> None:
        while self.count < count:
            if not any(thread.is_alive() for thread in self._threads):
                raise RuntimeError(f"the streams ended after {self.count} tokens, before {count}")
            time.sleep(0.01)

    def rate(self, start_s: float, end_s: float) -> float:
        """Tokens a second."""
        return sum(start_s <= time_s < end_s for time_s in self._times_s) / (end_s - start_s)

    def join(self) -> None:
        for thread in self._threads:
            thread.join()

    def _follow(self, stream: Stream) -> None:
        for piece in stream:
            self._times_s += [token.time_s for token in piece.tokens]


def two_nodes(path: Path, sizes: Sizes) -> Figure:
    """4 streams over processes that are bound to a core each."""
    rates: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(sizes.runs):
        for cores, found in rates.items():
            command = [sys.executable, "-m", "benchmarks.streams", "--worker", str(cores), "--folder", str(path.parent)]
            command += ["--tiny"] if sizes == TINY else []
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found.append(float(json.loads(done.stdout.splitlines()[-1])))
    one, two = (statistics.median(found) for found in rates.values())
    behind = f"{two:.2f} and {one:.2f} tokens/s"
    return Figure("two nodes of one core against one, 4 streams in int4", two / one, None, behind)


def work_on_cores(path: Path, sizes: Sizes, cores: int) -> None:
    """In a process of its own: prints the decode rate of 4 streams over so many nodes, on a core each."""
    os.sched_setaffinity(0, {0})
    scenario = Scenario(4, sizes.prompt_tokens, None, sizes.answer_tokens)
    with bound_engine(path, cores) as engine:
        measure(engine, Scenario(1, 8, None, 2), seed=0)
        print(json.dumps(measure(engine, scenario, seed=1).decode_rate))


@contextmanager
def bound_engine(path: Path, cores: int) -> Iterator[Engine]:
    length = 512
    if cores == 1:
        with Engine(path, quantization="int4", sequence_length=length, max_sequences=4) as engine:
            yield engine
        return
    made = chunks_of(path, FORMATS["int4"], 2)
    places = {"starter": Place(LOOPBACK, free_port()), "finisher": Place(LOOPBACK, free_port(), on_second_core)}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="mdi-streams-")))
        stack.callback(made.close)
        nodes = stack.enter_context(ManualCluster(folder, places, chunks=made.folder))
        nodes.start_all()
        yield stack.enter_context(
            Engine(
                path,
                nodes_config=nodes.config,
                wait_s=120,
                quantization="int4",
                sequence_length=length,
                max_sequences=4,
            )
        )


@contextmanager
def on_second_core() -> Iterator[None]:
    """Processes that are started in this context are bound to the second core."""
    os.sched_setaffinity(0, {1})
    try:
        yield
    finally:
        os.sched_setaffinity(0, {0})


def median_run(engine: Engine, scenario: Scenario, sizes: Sizes) -> Run:
    runs = [measure(engine, scenario, seed=1 + number) for number in range(sizes.runs)]
    return sorted(runs, key=lambda run: run.decode_rate)[len(runs) // 2]


if __name__ == "__main__":
    main()
