"""The benchmarks' short modes end well and print their figures. The figures are not judged here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from testing.hosts import why_not

WHY_NO_HOSTS = why_not()
SOAKED = ("lost requests: 0", "recovery time", "nothing")


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("benchmarks.fullsize", "--tiny", "--folder", "FOLDER"), ("resident MB", "image encode", "prefill", "decode")),
        (("benchmarks.media", "--runs", "1"), ("ratio",)),
        (("benchmarks.links", "--rounds", "2", "--json", "FILE"), ("our link", "of the bare stream's rate")),
        (
            ("benchmarks.streams", "--tiny", "--only", "image", "--folder", "FOLDER"),
            ("image in the context", "encoded in"),
        ),
        (("benchmarks.mixed", "--requests", "60"), ("lost requests: 0; mixed up: 0", "ready afterwards: True")),
        (("benchmarks.memory", "--requests", "300", "--plot", "PLOT"), ("bytes a request", "node 1")),
        (("benchmarks.faults", "--faults", "2", "--seconds", "60"), SOAKED),
        pytest.param(
            ("benchmarks.faults", "--manual", "--faults", "2"),
            SOAKED,
            marks=pytest.mark.skipif(WHY_NO_HOSTS is not None, reason=str(WHY_NO_HOSTS)),
        ),
    ],
    ids=["fullsize", "media", "links", "streams", "mixed", "memory", "faults", "faults manual"],
)
def test_a_benchmark_runs_in_its_short_mode(arguments: tuple[str, ...], words: tuple[str, ...], tmp_path: Path) -> None:
    places = {"FOLDER": str(tmp_path), "FILE": str(tmp_path / "figures.json"), "PLOT": str(tmp_path / "memory.png")}
    filled = [places.get(argument, argument) for argument in arguments]
    done = subprocess.run([sys.executable, "-m", *filled], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in words)
    assert ("FILE" in arguments) == (tmp_path / "figures.json").exists()
