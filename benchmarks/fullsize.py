"""The exact Qwen2-VL-2B shape with random weights, in bf16, int8 and int4: speed against llama.cpp, transformers and
this machine's memory, time to load, and memory of one and of three nodes.

    python -m benchmarks.fullsize                     # 25 GB of disk, 14 GB of memory, an hour; builds llama.cpp once
    python -m benchmarks.fullsize --formats int8 --parts decode
    python -m benchmarks.fullsize --shape 0.5b        # a smaller model, without images
    python -m benchmarks.fullsize --shape tiny --peers transformers    # the same steps, in seconds

Every side computes in a process of its own while the others wait. A figure is the median over rounds, a ratio the
median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

from benchmarks.figures import Figure, in_turns, machine, ratio, report
from benchmarks.formats import FORMATS, SHAPES, Format, random_checkpoint, token_bytes
from benchmarks.gguf_file import gguf_file
from benchmarks.llama import llama_python
from benchmarks.nodes import chunks_of, loading, memory
from benchmarks.sides import Side
from mdi.checkpoint.source import open_source

IMAGE_SIDE = 448 // 14  # patches
LONG_CONTEXT = 0.8  # of the rate with a short one


@dataclass(frozen=True)
class Sizes:
    """Sizes of the work, in tokens. rounds: counted ones."""

    prompt: int = 2000
    llama_prompt: int = 512
    context: int = 100
    long_context: int = 4000
    answer: int = 24
    rounds: int = 5

    @property
    def sequence_length(self) -> int:
        """That all of it fits into."""
        return max(self.long_context, self.prompt) + self.answer + 1


TINY = Sizes(64, 32, 16, 128, 4, 2)


@dataclass(frozen=True)
class Sides:
    """The processes that are compared. Peers: None where they are not asked for."""

    roofline: Side
    ours: Side
    llama: Side | None
    transformers: Side | None

    def of(self, **calls: Callable[[Side], float]) -> dict[str, Callable[[], float]]:
        """Calls by the name of their side, of those that are there."""
        sides = {name: getattr(self, name) for name in calls}
        return {name: partial(calls[name], side) for name, side in sides.items() if side}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("checkpoints"), help="where the random checkpoint is kept")
    parser.add_argument("--shape", choices=SHAPES, default="2b")
    parser.add_argument("--formats", type=words, default=list(FORMATS))
    parser.add_argument("--parts", type=words, default=["decode", "prefill", "image", "nodes"])
    parser.add_argument("--peers", type=words, default=["llama", "transformers"])
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--json", type=Path, help="a file for the figures")
    options = parser.parse_args()
    sizes = TINY if options.shape == "tiny" else Sizes()
    sizes = replace(sizes, rounds=options.rounds or sizes.rounds)
    path = random_checkpoint(options.folder, options.shape)
    formats, threads = [FORMATS[name] for name in options.formats], len(os.sched_getaffinity(0))
    figures = chain(
        speeds(path, formats, options.parts, options.peers, sizes, threads),
        nodes(path, formats if "nodes" in options.parts else []),
    )
    report(figures, f"{path.name}, {threads} threads of {machine()}", options.json)


def words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def speeds(
    path: Path, formats: list[Format], parts: list[str], peers: list[str], sizes: Sizes, threads: int
) -> Iterator[Figure]:
    """One format after the other; transformers stays loaded in bfloat16."""
    chosen = [PARTS[name] for name in parts if name in PARTS]
    if not chosen:
        return
    with ExitStack() as outer:
        roofline = outer.enter_context(Side("benchmarks.roofline", threads=threads))
        transformers = None
        if "transformers" in peers:
            transformers = outer.enter_context(Side("benchmarks.transformers_side", path=str(path), threads=threads))
        for format_ in formats:
            with ExitStack() as stack:
                room: dict[str, Any] = {"sequence_length": sizes.sequence_length, "threads": threads}
                chunk = stack.enter_context(closing(chunks_of(path, format_, 1))).file("starter")
                ours = Side("benchmarks.stage_side", chunk=str(chunk), **room)
                stack.enter_context(ours)
                llama = None
                if "llama" in peers:
                    file = str(gguf_file(path, format_.gguf))
                    llama = stack.enter_context(Side("benchmarks.llama", llama_python(), path=file, **room))
                for part in chosen:
                    yield from part(path, format_, Sides(roofline, ours, llama, transformers), sizes)


def decode(path: Path, format_: Format, sides: Sides, sizes: Sizes) -> Iterator[Figure]:
    """One stream: against the peers with a short context, against itself with a long one, against memory."""
    short = {"ids": ids(sizes.context)}
    for side in (sides.llama, sides.transformers):
        if side:
            side.seconds("prefill", **short)
    sides.ours.seconds("prefill", ids=ids(sizes.long_context))

    def seconds(side: Side, **context: int) -> float:
        return side.seconds("decode", n_tokens=sizes.answer, **context) / sizes.answer

    calls = sides.of(ours=partial(seconds, context=sizes.context), llama=seconds, transformers=seconds)
    calls["long"] = partial(seconds, sides.ours, context=sizes.long_context)
    calls["read"] = partial(sides.roofline.value, "read_rate")
    found = in_turns(calls, sizes.rounds)
    here = per_s(found["ours"])
    if sides.llama:
        faster = ratio(found["llama"], found["ours"])
        against = f"llama.cpp {format_.gguf} {per_s(found['llama'])}"
        yield Figure(format_.name, "decode, one stream", here, against, faster, format_.decode)
    if sides.transformers:
        faster = ratio(found["transformers"], found["ours"])
        against = f"transformers bf16 {per_s(found['transformers'])}"
        yield Figure(format_.name, "decode, one stream", here, against, faster)
    size_bytes = token_bytes(path, format_)
    read = [size_bytes / seconds for seconds in found["ours"]]
    against = f"memory gives {median(found['read']) / 1e9:.1f} GB/s"
    share = ratio(read, found["read"])
    yield Figure(
        format_.name, "decode, weights read", f"{median(read) / 1e9:.1f} GB/s", against, share, format_.roofline
    )
    kept, against = ratio(found["ours"], found["long"]), f"after {sizes.context}: {per_s(found['ours'])}"
    work, here = f"decode after {sizes.long_context} tokens", per_s(found["long"])
    yield Figure(format_.name, work, here, against, kept, LONG_CONTEXT)


def prefill(_path: Path, format_: Format, sides: Sides, sizes: Sizes) -> Iterator[Figure]:
    """One prompt. llama.cpp gets a shorter one: it is slower, and its rate depends little on the length."""

    def seconds(side: Side, n_tokens: int = sizes.prompt) -> float:
        return side.seconds("prefill", ids=ids(n_tokens)) / n_tokens

    llama = partial(seconds, n_tokens=sizes.llama_prompt)
    found = in_turns(sides.of(ours=seconds, transformers=seconds, llama=llama), max(2, sizes.rounds // 2))
    work, here = f"prefill of {sizes.prompt}", per_s(found["ours"])
    if sides.transformers:
        against = f"transformers bf16 {per_s(found['transformers'])}"
        yield Figure(format_.name, work, here, against, ratio(found["transformers"], found["ours"]), format_.prefill)
    if sides.llama:
        against = f"llama.cpp {format_.gguf} {per_s(found['llama'])} of {sizes.llama_prompt}"
        yield Figure(format_.name, work, here, against, ratio(found["llama"], found["ours"]))


def image(path: Path, format_: Format, sides: Sides, sizes: Sizes) -> Iterator[Figure]:
    """Encoding an image of 448 x 448."""
    if format_.image is None or not open_source(path).model_config.vision:
        return

    def seconds(side: Side) -> float:
        return side.seconds("encode", side=IMAGE_SIDE)

    found = in_turns(sides.of(ours=seconds, transformers=seconds), max(2, sizes.rounds // 2))
    here = f"{median(found['ours']):.2f} s"
    if sides.transformers:
        against = f"transformers bf16 {median(found['transformers']):.2f} s"
        faster = ratio(found["transformers"], found["ours"])
        yield Figure(format_.name, "image 448 x 448", here, against, faster, format_.image)


PARTS = {"decode": decode, "prefill": prefill, "image": image}


def nodes(path: Path, formats: list[Format]) -> Iterator[Figure]:
    """Loading, and memory of one and of three nodes."""
    for format_ in formats:
        for n_nodes in (1, 3):
            chunks = chunks_of(path, format_, n_nodes)
            if n_nodes == 1:
                yield loading(chunks, format_)
            yield memory(path, chunks, format_, n_nodes)


def ids(n_tokens: int) -> list[int]:
    """A prompt of random tokens, the same for all sides."""
    random = Random(n_tokens)
    return [random.randrange(200) for _ in range(n_tokens)]


def per_s(seconds: list[float]) -> str:
    return f"{1 / median(seconds):.1f} tokens/s"


if __name__ == "__main__":
    main()
