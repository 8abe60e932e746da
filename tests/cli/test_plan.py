"""`mdi plan`: the split, and what a limit of the KV cache means for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from mdi.cli.app import app


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), ("starter", "0-5 (6)")),
        (("--n-nodes", "2"), ("starter", "finisher")),
        (("--kv-cache-gb", "0.001"), ("KV cache: 640 tokens of all sequences together; one has 640 at most",)),
    ],
)
def test_a_plan_is_shown_without_measured_machines(
    tiny_checkpoint: Path, options: tuple[str, ...], words: tuple[str, ...]
) -> None:
    done = CliRunner().invoke(app, ["plan", str(tiny_checkpoint), *options])
    assert done.exit_code == 0, done.output
    assert all(word in done.output for word in words)
