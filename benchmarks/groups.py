"""Groups: what a second node of one core brings when both compute one stage, against one node of one core.

    python -m benchmarks.groups                        # the exact Qwen2-VL-2B shape: bf16, int8, int4; 15 GB of memory
    python -m benchmarks.groups --formats int4 --turns 2
    python -m benchmarks.groups --shape tiny           # the same steps on a tiny model: a minute

Both sides have random weights, and links are encrypted. They take turns in one run; the median of the turns' ratios
counts. Two cores that share a memory bus, or one physical core, are not twice one: the first figure of each type says
how much faster this machine reads these weights with two threads than with one, which is the limit of decode.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from benchmarks.figures import Figure, in_turns, ratio, report
from benchmarks.formats import FORMATS, Format, engine_settings, random_checkpoint
from benchmarks.sides import Side

TARGETS = {"bf16": 1.8, "int8": 1.7, "int4": 1.5}
PREFILL = 1.6
PREFILL_TOKENS = 2000
STREAMS = (1, 4)
TURNS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("checkpoints"), help="where random checkpoints are kept")
    parser.add_argument("--shape", default="2b", help="of the model")
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=list(FORMATS))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--answer", type=int, default=48, help="tokens of each answer")
    parser.add_argument("--prompt", type=int, default=PREFILL_TOKENS, help="tokens of the long prompt")
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--json", type=Path, help="write the table there, too")
    options = parser.parse_args()
    path = random_checkpoint(options.folder, options.shape)
    figures = (figure for name in options.formats for figure in compared(path, FORMATS[name], options))
    report(figures, f"{path.name}: {options.ranks} ranks against one node of one core", options.json)


def compared(path: Path, format_: Format, options: argparse.Namespace) -> Iterator[Figure]:
    """Decoding of one and of four streams, and the first token of a long prompt."""
    settings: dict[str, Any] = {"dtype": "bfloat16", "sequence_length": options.prompt + 256, "max_sequences": 4}
    settings |= {"encryption": True, **engine_settings(format_)}
    group = {"n_nodes": options.ranks, "tensor_parallel_size": options.ranks}
    with ExitStack() as stack:
        both = stack.enter_context(Side("benchmarks.engine_side", path=str(path), settings=settings))
        one = stack.enter_context(Side("benchmarks.engine_side", path=str(path), settings=settings, cores=1))
        ranks = stack.enter_context(Side("benchmarks.engine_side", path=str(path), settings=settings | group))
        sides = {"one": one, "both": both, "ranks": ranks}
        for streams in STREAMS:
            work = {"streams": streams, "prompt_tokens": 32, "answer_tokens": options.answer}
            rates = turns(sides, work, "decode_rate", options.turns)
            limit = f"one process of two threads {ratio(rates['both'], rates['one']):.2f}"
            here = f"{max(rates['ranks']):.2f} tokens/s"
            target = TARGETS[format_.name]
            found = ratio(rates["ranks"], rates["one"])
            yield Figure(format_.name, f"decode, streams: {streams}", here, limit, found, target)
        work = {"streams": 1, "prompt_tokens": options.prompt, "answer_tokens": 2}
        seconds = turns(sides, work, "first_token_s", options.turns)
        limit = f"one process of two threads {ratio(seconds['one'], seconds['both']):.2f}"
        here = f"{min(seconds['ranks']):.2f} s"
        found = ratio(seconds["one"], seconds["ranks"])
        yield Figure(format_.name, f"first of {options.prompt} tokens", here, limit, found, PREFILL)


def turns(sides: dict[str, Side], work: dict[str, int], value: str, n_turns: int) -> dict[str, list[float]]:
    """What each side measures in each turn, of prompts that are in no cache."""

    def call(side: Side, seeds: Iterator[int]) -> float:
        return float(side.value("measured", **work, seed=next(seeds))[value])

    return in_turns({name: partial(call, side, count()) for name, side in sides.items()}, n_turns)


if __name__ == "__main__":
    main()
