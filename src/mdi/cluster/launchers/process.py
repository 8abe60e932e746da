"""One process of a node: started with a pipe as its standard input, watched, and its log read."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

from mdi.core.errors import LinkError
from mdi.rpc.tls import VARIABLE, Identity

LAST_LINES = 4000  # characters of the log that are kept
MODULE = "mdi"  # that Python runs; benchmarks run one of their own
DRAIN_S = 1.0  # for the last lines of a process that has ended


class NodeProcess:
    """One run of `mdi secondary`. ended: called once, in a thread, when it is over. Raises OSError if it fails to.

    The pipe's other end is held here alone: when this process ends, however it ends, so does the node (see
    `cli/parent.py`). options: which node it is, and how it computes. listen: the host, at a free port. The identity, if
    any, goes through another pipe: a killed process leaves no private key on the disk. log: where its log goes; only
    the end of it is kept otherwise.
    """

    def __init__(
        self,
        name: str,
        options: Sequence[str],
        listen: str,
        identity: Identity | None,
        ended: Callable[[NodeProcess], None],
        log: TextIO | None = None,
    ) -> None:
        self.name = name
        self._listen = f"[{listen}]" if ":" in listen else listen
        self._log = log
        self._tail = ""
        command = [sys.executable, "-m", MODULE, "secondary", *options]
        command += ["--listen", f"{self._listen}:0", "--with-parent"]
        with _sent(identity) as pipes:
            self._process = subprocess.Popen(
                [*command, *(f"--identity-pipe={pipe}" for pipe in pipes)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                env={**os.environ, VARIABLE: "1" if identity else "0"},
                process_group=0,  # Ctrl-C reaches the parent alone: it drains, and then ends its nodes
                pass_fds=pipes,
            )
        self._reader = threading.Thread(target=self._read, name=f"mdi-log-{name}", daemon=True)
        self._watcher = threading.Thread(target=self._watch, args=(ended,), name=f"mdi-watch-{name}", daemon=True)
        self._reader.start()
        self._watcher.start()

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    @property
    def pid(self) -> int:
        return self._process.pid

    def address(self, deadline: float) -> str:
        """Waits for the line in which a node names its port. Raises LinkError when it ends, or `deadline` passes."""
        assert self._process.stdout
        while not select.select([self._process.stdout], [], [], 0.1)[0]:
            if time.monotonic() > deadline:
                raise LinkError(f"node {self.name} did not start in time", self.name)
        line = self._process.stdout.readline()
        if not line:
            raise self.wait()
        return f"{self._listen}:{json.loads(line)['port']}"

    def wait(self) -> LinkError:
        """Waits for its end; why it ended."""
        self._watcher.join()
        return self.death()

    def death(self) -> LinkError:
        """Why it ended, once it has: exit code and last line of its log."""
        lines = self._tail.strip().splitlines()
        last = f": {lines[-1]}" if lines else ""
        return LinkError(f"node {self.name} ended with exit code {self._process.returncode}{last}", self.name)

    def ask_to_end(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()

    def end(self, timeout_s: float) -> None:
        """Waits for its end; kills it after `timeout_s`."""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            self._process.wait()

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        """Releases what is left of a process that has ended, or is about to. Safe to call twice."""
        self.ask_to_end()
        self._process.wait()
        self._watcher.join()
        self._reader.join()
        assert self._process.stdout
        assert self._process.stderr
        self._process.stdout.close()
        self._process.stderr.close()

    def _watch(self, ended: Callable[[NodeProcess], None]) -> None:
        self._process.wait()
        self._reader.join(DRAIN_S)
        ended(self)

    def _read(self) -> None:
        assert self._process.stderr
        for line in self._process.stderr:
            self._tail = (self._tail + line)[-LAST_LINES:]
            if self._log:
                self._log.write(line)
                self._log.flush()


@contextmanager
def _sent(identity: Identity | None) -> Iterator[list[int]]:
    """The end of a pipe from which a node reads its identity, if it has one: it fits into the pipe's buffer."""
    if identity is None:
        yield []
        return
    reading, writing = os.pipe()
    try:
        identity.send(writing)
        yield [reading]
    finally:
        os.close(reading)
