"""Groups: what more nodes of one core bring when all compute one stage, against one node of one core.

    python -m benchmarks.groups                                  # the exact Qwen2-VL-2B: bf16, int8, int4; 15 GB
    python -m benchmarks.groups --formats int4 --turns 2
    python -m benchmarks.groups --shape 7b --formats int4        # exact layers of Qwen2-VL-7B, 8 of them
    python -m benchmarks.groups --shape tinyllama --formats bf16 --works samples    # upstream's record
    python -m benchmarks.groups --formats int4 --ranks 3 4 --works tokens decode
    python -m benchmarks.groups --shape tiny                     # the same steps on a tiny model: a minute

Works: `decode` one stream and four, `prefill` a long prompt, `samples` three samples of one prompt at once, also of
two nodes that split the layers, and `tokens`: a greedy answer, token by token against one node with as many shards.

All sides have random weights, and links are encrypted. They take turns in one run; the median of the turns' ratios
counts. Two cores that share a memory bus, or one physical core, are not twice one: one process with a thread on each
core is the limit here. With more ranks than cores, speed says nothing.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from benchmarks.figures import Figure, in_turns, machine, ratio, report
from benchmarks.formats import FORMATS, Format, engine_settings, random_checkpoint
from benchmarks.sides import Side

TARGETS = {"bf16": 1.8, "int8": 1.7, "int4": 1.5}
TARGETS_7B = {"int4": 1.7}
PREFILL = 1.6
UPSTREAM = 1.7  # on three nodes
PREFILL_TOKENS = 2000
SHORT_PROMPT = 32
STREAMS = (1, 4)
SAMPLES = 3
TURNS = 5
SEEDS = count()
WORKS = ("tokens", "decode", "prefill", "samples")


@dataclass(frozen=True)
class Work:
    """What every side does. call: a method of `OurEngine`, with these arguments; value: which of its figures counts."""

    name: str
    call: str
    value: str
    arguments: dict[str, int]
    target: float | None = None

    @property
    def is_rate(self) -> bool:
        """Tokens a second; seconds otherwise."""
        return self.value != "first_token_s"

    def ratio(self, found: dict[str, list[float]], side: str) -> float:
        """How many times as fast as one node a side is."""
        return ratio(found[side], found["one"]) if self.is_rate else ratio(found["one"], found[side])

    def text(self, found: list[float]) -> str:
        """The best of the turns."""
        return f"{max(found):.2f} tokens/s" if self.is_rate else f"{min(found):.2f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("checkpoints"), help="where random checkpoints are kept")
    parser.add_argument("--shape", default="2b", help="of the model")
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=list(FORMATS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[2], help="nodes of a group; several in turn")
    parser.add_argument("--works", nargs="+", choices=WORKS, default=["decode", "prefill"])
    parser.add_argument("--answer", type=int, default=48, help="tokens of each answer")
    parser.add_argument("--prompt", type=int, default=PREFILL_TOKENS, help="tokens of the long prompt")
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--json", type=Path, help="write the table there, too")
    options = parser.parse_args()
    path = random_checkpoint(options.folder, options.shape)
    figures = (
        figure
        for name in options.formats
        for n_ranks in options.ranks
        for figure in compared(path, FORMATS[name], n_ranks, options)
    )
    report(figures, f"{path.name}: groups against one node of one core. {machine()}", options.json)


def compared(path: Path, format_: Format, n_ranks: int, options: argparse.Namespace) -> Iterator[Figure]:
    """All works in one type, on a group of so many ranks."""
    longest = options.prompt if "prefill" in options.works else SHORT_PROMPT
    settings: dict[str, Any] = {"dtype": "bfloat16", "sequence_length": longest + options.answer + 256}
    settings |= {"max_sequences": max(STREAMS), "encryption": True, **engine_settings(format_)}
    group = {"n_nodes": n_ranks, "tensor_parallel_size": n_ranks}

    def side(cores: int | None = None, threads: int | None = None, **more: Any) -> Side:
        return Side("benchmarks.engine_side", path=str(path), settings=settings | more, cores=cores, threads=threads)

    if "tokens" in options.works:
        yield equality(partial(side, shards=n_ranks), partial(side, **group), format_.name, n_ranks, options.answer)
    works = chosen_works(options, format_.name)
    if not works:
        return
    with ExitStack() as stack:
        sides = {"one": side(cores=1), "both": side(), f"{n_ranks} ranks": side(**group)}
        if "samples" in options.works:
            sides["layers over 2 nodes"] = side(n_nodes=2, threads=1)
        for opened in sides.values():
            stack.enter_context(opened)
        for work in works:
            yield from figures_of(work, sides, format_.name, n_ranks, options.turns)


def equality(one: Callable[[], Side], group: Callable[[], Side], name: str, n_ranks: int, n_tokens: int) -> Figure:
    """The greedy answer of a group, against that of one node with as many shards."""
    answers = list[list[int]]()
    for start in (one, group):
        with start() as side:
            answers.append(side.value("tokens", prompt_tokens=SHORT_PROMPT, answer_tokens=n_tokens, seed=0))
    equal = sum(ours == theirs for ours, theirs in zip(*answers, strict=True))
    here, against = f"{equal} of {n_tokens} are equal", f"one node with {n_ranks} shards"
    return Figure(name, f"tokens, {n_ranks} ranks", here, against, equal / n_tokens, 1.0)


def chosen_works(options: argparse.Namespace, name: str) -> list[Work]:
    """Those that are timed. name: of the type."""
    target = (TARGETS_7B if options.shape == "7b" else TARGETS).get(name)
    prompt, answer = {"prompt_tokens": SHORT_PROMPT}, {"answer_tokens": options.answer}
    known = {
        "decode": [
            Work(
                f"decode, streams: {streams}", "measured", "decode_rate", {"streams": streams} | prompt | answer, target
            )
            for streams in STREAMS
        ],
        "prefill": [
            Work(
                f"first of {options.prompt} tokens",
                "measured",
                "first_token_s",
                {"streams": 1, "prompt_tokens": options.prompt, "answer_tokens": 2},
                PREFILL,
            )
        ],
        "samples": [
            Work(f"{SAMPLES} samples", "sampled", "throughput", {"samples": SAMPLES} | prompt | answer, UPSTREAM)
        ],
    }
    return [work for kind, works in known.items() if kind in options.works for work in works]


def figures_of(work: Work, sides: dict[str, Side], name: str, n_ranks: int, n_turns: int) -> Iterator[Figure]:
    """Of each split, against one node. Prompts of all turns differ, and are in no cache."""

    def call(side: Side) -> float:
        return float(side.value(work.call, **work.arguments, seed=next(SEEDS))[work.value])

    found = in_turns({name: partial(call, side) for name, side in sides.items()}, n_turns)
    crowded = "; more ranks than cores" if n_ranks > len(os.sched_getaffinity(0)) else ""
    limit = f"one process with all cores {work.ratio(found, 'both'):.2f}{crowded}"
    for split in [split for split in sides if split not in ("one", "both")]:
        target = work.target if "ranks" in split and not crowded else None
        yield Figure(name, f"{work.name}; {split}", work.text(found[split]), limit, work.ratio(found, split), target)


if __name__ == "__main__":
    main()
