"""What a constraint costs a token: a grammar takes the last one, gives the mask of the next, and the sampler obeys.

    python -m benchmarks.masks --tokenizer FOLDER    # a checkpoint with its tokenizer, such as Qwen2-VL's
    python -m benchmarks.masks                       # the bundled one: 694 tokens

The answers are given texts, in the tokens that the tokenizer writes them in. Logits are random. Times are those of the
processor, without waits for it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from mdi.checkpoint.bundled import SHIPPED
from mdi.core.batch import TokenSampling
from mdi.core.constraint import Constraint, json_rule
from mdi.engine.grammar import Grammars
from mdi.layers.sampler import sample
from mdi.prompt.tokenizer import Tokenizer

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
COUNTRIES = {"enum": [f"province {number * 7919 % 100003} of the north" for number in range(1000)]}
PROSE = "Once upon a time there was a person who wrote long texts, line after line.\n" * 6
CASES = {
    "object": (
        json_rule(PERSON),
        '{"name": "Bartholomew of the long valley", "age": 31415, "tags": ["a", "hill", "x"]}',
    ),
    "any JSON": (json_rule({"type": "object"}), '{"a": [1, 2.5, {"b": null, "c": "some words"}], "d": true}'),
    "1,000 choices": (json_rule(COUNTRIES), json.dumps(COUNTRIES["enum"][500])),
    "regex": (r"/[a-z]+@[a-z]+\.(com|org)/", "somebody@somewhere.org"),
    "free text": (r"/(.|\n)*/", PROSE),
}
ROUNDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, default=SHIPPED, help="a checkpoint's folder")
    parser.add_argument("--vocab-size", type=int, help="rows of the head, if there are more than tokens")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = Tokenizer(options.tokenizer)
    vocab_size = options.vocab_size or tokenizer.backend.get_vocab_size()
    grammars = Grammars(tokenizer, frozenset(), vocab_size)
    console = Console()
    console.print(f"taking {vocab_size:,} tokens apart: {_seconds(lambda: grammars._parts):.2f} s, once a server")
    columns = ("grammar", "compiled", "push", "95th", "worst", "mask", "sampler", "in all")
    table = Table(*columns, title="ms; those of a token are medians")
    for name, (rule, text) in CASES.items():
        costs = _costs(grammars, Constraint(f"start: {rule}", name), tokenizer.encode(text), vocab_size)
        table.add_row(name, *(f"{cost_s * 1000:.3f}" for cost_s in costs))
    grammars.close()
    console.print(table)


def _costs(grammars: Grammars, constraint: Constraint, ids: Sequence[int], vocab_size: int) -> list[float]:
    """Seconds, in the order of the table's columns."""
    compiled_s = _seconds(lambda: grammars.matcher(constraint))
    logits, free = torch.randn(1, vocab_size), TokenSampling(0.0, 0, 1.0, 0.0, 0, 0, 0)
    pushes, masks, samples = list[float](), list[float](), list[float]()
    for _ in range(ROUNDS):
        matcher = grammars.matcher(constraint)
        for token_id in ids:
            masks.append(_seconds(partial(matcher.mask, (), may_end=True)))
            masked = replace(free, token_mask=matcher.mask((), may_end=True))
            samples.append(_seconds(partial(sample, logits, [masked])) - _seconds(partial(sample, logits, [free])))
            pushes.append(_seconds(partial(matcher.push, token_id)))
    in_all = [sum(parts) for parts in zip(pushes, masks, samples, strict=True)]
    medians = [_at(part, 0.5) for part in (masks, samples, in_all)]
    return [compiled_s, _at(pushes, 0.5), _at(pushes, 0.95), max(pushes), *medians]


def _seconds(work: Callable[[], object]) -> float:
    started_s = time.thread_time()
    work()
    return time.thread_time() - started_s


def _at(values: list[float], share: float) -> float:
    return sorted(values)[int(share * len(values))]


if __name__ == "__main__":
    main()
