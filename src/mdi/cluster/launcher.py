"""Starts node processes on this machine, watches them, and makes sure none outlives its parent."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO

from mdi.errors import LinkError
from mdi.pipeline.grpc_link import NodeAddress

START_TIMEOUT_S = 60.0
END_TIMEOUT_S = 5.0
TAIL_BYTES = 4000


class LocalLauncher:
    """One `mdi secondary` process per chunk, each with a pipe as its standard input.

    The pipe's other end is held here alone: when this process ends, however it ends, every node reads the end of its
    input and ends too. `start` returns when all listen; they load on after that.
    """

    def __init__(self, chunks: Sequence[Path], *, dtype: str, device: str, threads: int) -> None:
        self._closing = False
        self._watchers: list[threading.Thread] = []
        self._logs = ExitStack()
        self._processes: list[tuple[str, subprocess.Popen[bytes], IO[bytes]]] = []
        try:
            for chunk in chunks:
                self._start(chunk, dtype, device, threads)
            self.nodes = [NodeAddress(name, _address(name, process, log)) for name, process, log in self._processes]
        except BaseException:
            self.close()
            raise

    def watch(self, died: Callable[[LinkError], None]) -> None:
        """Calls back, from a thread, when a node ends before it was told to."""
        for name, process, log in self._processes:
            watcher = threading.Thread(target=self._watch, args=(name, process, log, died), daemon=True)
            watcher.start()
            self._watchers.append(watcher)

    def close(self) -> None:
        """Ends every node and waits for it. Safe to call twice."""
        self._closing = True
        for _, process, _ in self._processes:
            assert process.stdin
            process.stdin.close()
        for _, process, _ in self._processes:
            try:
                process.wait(END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            assert process.stdout
            process.stdout.close()
        for watcher in self._watchers:
            watcher.join()
        self._logs.close()

    def _start(self, chunk: Path, dtype: str, device: str, threads: int) -> None:
        log = self._logs.enter_context(tempfile.TemporaryFile())
        command = [sys.executable, "-m", "mdi", "secondary", "--chunk", str(chunk), "--dtype", dtype]
        command += ["--device", device, "--threads", str(threads), "--listen", "127.0.0.1:0", "--with-parent"]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)
        self._processes.append((chunk.stem.removeprefix("model_"), process, log))

    def _watch(
        self, name: str, process: subprocess.Popen[bytes], log: IO[bytes], died: Callable[[LinkError], None]
    ) -> None:
        process.wait()
        if not self._closing:
            died(_death(name, process, log))


def _address(name: str, process: subprocess.Popen[bytes], log: IO[bytes]) -> str:
    """Waits for the line in which a node names its port."""
    assert process.stdout
    deadline = time.monotonic() + START_TIMEOUT_S
    while not select.select([process.stdout], [], [], 0.1)[0]:
        if time.monotonic() > deadline:
            raise LinkError(f"node {name} did not start within {START_TIMEOUT_S:g} s")
    line = process.stdout.readline()
    if not line:
        process.wait()
        raise _death(name, process, log)
    return f"127.0.0.1:{json.loads(line)['port']}"


def _death(name: str, process: subprocess.Popen[bytes], log: IO[bytes]) -> LinkError:
    size = os.fstat(log.fileno()).st_size
    lines = os.pread(log.fileno(), TAIL_BYTES, max(0, size - TAIL_BYTES)).decode(errors="replace").strip().splitlines()
    last = f": {lines[-1]}" if lines else ""
    return LinkError(f"node {name} ended with exit code {process.returncode}{last}")
