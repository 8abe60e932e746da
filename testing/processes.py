"""`mdi` commands as processes: run to their end, read while they run, or serving HTTP."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "NO_COLOR": "1"}


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "mdi", *map(str, arguments)]


def mdi(*arguments: str | Path, timeout_s: float = 100) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end."""
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=timeout_s, env=ENVIRONMENT, errors="replace"
    )


class Process:
    """A running command. lines: what it has written to standard error."""

    def __init__(self, arguments: Sequence[str | Path], environment: dict[str, str] = ENVIRONMENT) -> None:
        self.popen = subprocess.Popen(
            command(*arguments),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=environment,
        )
        self.lines: list[str] = []
        self._ended = False
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def wait_for_line(self, part: str, timeout_s: float = 100) -> str:
        """The first line that contains `part`."""

        def found() -> str | None:
            return next((line for line in self.lines if part in line), None)

        with self._changed:
            self._changed.wait_for(lambda: found() or self._ended, timeout_s)
            line = found()
        assert line, f"no line contains {part!r}: {''.join(self.lines)}"
        return line

    def kill(self) -> None:
        """Ends the process if it still runs, and closes its pipes."""
        self.popen.kill()
        self.popen.wait()
        self._reader.join()
        for pipe in (self.popen.stdout, self.popen.stderr):
            assert pipe
            pipe.close()

    def _read(self) -> None:
        assert self.popen.stderr
        for line in self.popen.stderr:
            with self._changed:
                self.lines.append(line)
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()


@contextmanager
def serving(
    model: str | Path, *options: str | Path, environment: dict[str, str] | None = None
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A running `mdi serve` on a free port: the process and its URL. Raises RuntimeError when it does not start."""
    words = command("serve", model, "--port", "0", *options)
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(words, stdout=subprocess.PIPE, stderr=log, text=True, env=environment) as process,
    ):
        try:
            assert process.stdout
            line = process.stdout.readline()
            url = re.search(r"http://\S+", line)
            if url is None:
                process.kill()
                process.wait()
                log.seek(0)
                raise RuntimeError(f"mdi serve {model} did not start: {line}{log.read()}")
            yield process, url[0]
        finally:
            process.kill()


def node_processes() -> list[psutil.Process]:
    """The node processes below this process that still run."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if child.status() != psutil.STATUS_ZOMBIE and "secondary" in child.cmdline()]
