"""Random damage to the JSON files of checkpoints: each result answers as transformers does, or is refused by name.

    python -m benchmarks.mutations [--count 2000] [--processes 50] [--seed 0]

The first number are tried in this process, the second as `mdi ask` processes. Exits with 1 after a finding.
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image
from skimage import data
from testing.checkpoints import tiny_config, tiny_text_config
from testing.mutations import QUESTION, Mutation, Outcome, mutated, mutations, outcome_of
from testing.oracle import Oracle
from transformers.utils import logging as transformers_logging

from mdi.checkpoint.random_weights import write_random_checkpoint

EXIT_REFUSED = 2
QUICK = settings(deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--processes", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    picture = Image.fromarray(data.coffee()).resize((112, 84))
    with tempfile.TemporaryDirectory() as parent:
        folders = write_checkpoints(Path(parent))
        here = run(folders, args.count, args.seed, lambda path, change: outcome_of(path, change, picture))
        there = run(folders, args.processes, args.seed + 1, asked)
    sys.exit(1 if here or there else 0)


def write_checkpoints(parent: Path) -> list[Path]:
    """A Qwen2-VL in one file, and a Qwen2 in two with an index."""
    return [
        write_random_checkpoint(parent / "vision", tiny_config(num_hidden_layers=2)),
        write_random_checkpoint(parent / "text", tiny_text_config(num_hidden_layers=2), shards=2),
    ]


def run(folders: list[Path], count: int, first: int, check: Callable[[Path, Mutation], Outcome]) -> list[str]:
    """Checks so many mutations and prints what became of them. Returns the findings."""
    if not count:
        return []
    found, kinds, started = list[str](), Counter[str](), time.monotonic()

    @seed(first)
    @settings(QUICK, max_examples=count)
    @given(st.one_of([st.tuples(st.just(folder), mutations(folder)) for folder in folders]))
    def attempt(drawn: tuple[Path, Mutation]) -> None:
        folder, mutation = drawn
        with mutated(folder, mutation) as path:
            try:
                kinds[check(path, mutation).kind] += 1
            except Exception as error:  # a finding, whatever it is
                kinds["wrong"] += 1
                found.append(
                    f"{folder.name} {mutation.file}: {mutation.what!a}\n  {type(error).__name__}: {str(error)[:500]!a}"
                )
                print(found[-1], flush=True)

    attempt()
    counts = ", ".join(f"{kind} {number}" for kind, number in sorted(kinds.items()))
    print(f"{sum(kinds.values())} mutations in {time.monotonic() - started:.0f} s: {counts}", flush=True)
    return found


def asked(path: Path, _mutation: Mutation) -> Outcome:
    """`mdi ask`: transformers' answer, or one line and exit status 2."""
    command = [sys.executable, "-m", "mdi", "ask", str(path), QUESTION, "--max-tokens", "6", "--temperature", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode == EXIT_REFUSED:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        assert len(lines) == 1, done.stderr
        assert lines[0].startswith("error: "), done.stderr
        return Outcome("refused", lines[0])
    assert done.returncode == 0, done.stderr
    try:
        oracle = Oracle(path)
        ids = oracle.answer(QUESTION, n_tokens=6)
    except Exception:
        return Outcome("alone")
    expected = oracle.tokenizer.decode(ids, skip_special_tokens=True)
    assert done.stdout.strip() == expected.strip(), f"{done.stdout!r}, transformers {expected!r}"
    return Outcome("equal")


if __name__ == "__main__":
    main()
