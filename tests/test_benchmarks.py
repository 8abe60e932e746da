"""The benchmarks' short modes: they run, and print what they promise. What they measure is not judged here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("benchmarks.fullsize", "--tiny", "--folder", "FOLDER"), ("resident MB", "image encode", "prefill", "decode")),
        (("benchmarks.media", "--runs", "1"), ("ratio",)),
        (("benchmarks.faults", "--faults", "2", "--seconds", "60"), ("lost requests: 0", "recovery time", "nothing")),
    ],
    ids=["fullsize", "media", "faults"],
)
def test_a_benchmark_runs_in_its_short_mode(arguments: tuple[str, ...], words: tuple[str, ...], tmp_path: Path) -> None:
    filled = [str(tmp_path) if argument == "FOLDER" else argument for argument in arguments]
    done = subprocess.run([sys.executable, "-m", *filled], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in words)
