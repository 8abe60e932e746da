"""`mdi serve` as a process of its own, for as long as a benchmark or a test needs it."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def serving(
    model: str, *options: str, environment: dict[str, str] | None = None
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A running server on a free port, and its URL. Raises RuntimeError when it does not start."""
    command = [sys.executable, "-m", "mdi", "serve", model, "--port", "0", *options]
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True, env=environment) as process,
    ):
        try:
            assert process.stdout
            line = process.stdout.readline()
            found = re.search(r"http://\S+", line)
            if found is None:
                process.kill()
                process.wait()
                said.seek(0)
                raise RuntimeError(f"mdi serve {model} did not start: {line}{said.read()}")
            yield process, found[0]
        finally:
            process.kill()
