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
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from pathlib import Path

from mdi.cluster.launchers.base import Died
from mdi.cluster.node_client import NodeAddress
from mdi.core.errors import LinkError
from mdi.rpc.authority import AUTHORITY_DAYS, Authority
from mdi.rpc.tls import VARIABLE, Identity

START_TIMEOUT_S = 60.0
END_TIMEOUT_S = 5.0
TAIL_BYTES = 4000


class LocalLauncher:
    """A `Launcher` of one `mdi secondary` process per chunk, each with a pipe as its standard input.

    The pipe's other end is held here alone: when this process ends, however it ends, so does every node (see
    `cli/parent.py`). Nodes that listen may still be loading. With an authority their links are encrypted.
    """

    def __init__(
        self, chunks: Sequence[Path], *, dtype: str, device: str, threads: int, authority: Authority | None = None
    ) -> None:
        self._authority = authority
        self._options = ["--dtype", dtype, "--device", device, "--threads", str(threads)]
        self._chunks = {chunk.stem.removeprefix("model_"): chunk for chunk in chunks}
        self._lock = threading.Lock()
        self._starting = threading.Lock()
        self._closing = False
        self._died: Died | None = None
        self._processes: dict[str, NodeProcess] = {}
        self._addresses: dict[str, str] = {}

    @property
    def nodes(self) -> list[NodeAddress]:
        return [NodeAddress(name, self._addresses[name]) for name in self._chunks]

    def watch(self, died: Died) -> None:
        self._died = died

    def start(self) -> None:
        self._start(self._chunks, START_TIMEOUT_S)

    def dead(self) -> set[str]:
        return {name for name, process in self._processes.items() if process.ended}

    def restart(self, names: Collection[str], timeout_s: float) -> None:
        self._start(names, min(timeout_s, START_TIMEOUT_S))

    def close(self) -> None:
        with self._lock:
            self._closing = True
        for process in self._processes.values():
            process.ask_to_end()
        for process in self._processes.values():
            process.end(END_TIMEOUT_S)
        with self._starting:  # whose processes have ended now
            for process in self._processes.values():
                process.close()

    def _start(self, names: Collection[str], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        with self._starting:
            for name in names:
                if before := self._replace(name):
                    before.close()
            for name in names:
                self._addresses[name] = self._processes[name].address(deadline)

    def _replace(self, name: str) -> NodeProcess | None:
        """Starts a node's process and returns the one it had before, whose death is no longer reported."""
        with self._lock:
            if self._closing:
                raise LinkError("the nodes are being ended")
            if before := self._processes.get(name):
                before.kill()
            identity = self._authority.issue(name, days=AUTHORITY_DAYS) if self._authority else None
            try:
                self._processes[name] = NodeProcess(name, self._chunks[name], self._options, identity, self._report)
            except OSError as error:
                raise LinkError(f"node {name} could not be started ({error.strerror})", name) from None
            return before

    def _report(self, process: NodeProcess) -> None:
        with self._lock:
            if self._died and not self._closing and self._processes[process.name] is process:
                self._died(process.death())


class NodeProcess:
    """One run of a node. ended: called once, from a thread, when it is over. Raises OSError when it cannot begin.

    The identity, if any, is on disk only until the node has read it.
    """

    def __init__(
        self,
        name: str,
        chunk: Path,
        options: Sequence[str],
        identity: Identity | None,
        ended: Callable[[NodeProcess], None],
    ) -> None:
        self.name = name
        with ExitStack() as undo:
            self._log = undo.enter_context(tempfile.TemporaryFile())
            self._certs = tempfile.TemporaryDirectory(prefix="mdi-certs-")  # of mode 0700
            undo.callback(self._certs.cleanup)
            if identity:
                identity.save(Path(self._certs.name))
            command = [sys.executable, "-m", "mdi", "secondary", "--chunk", str(chunk), *options]
            command += ["--listen", "127.0.0.1:0", "--with-parent", "--certs", self._certs.name]
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env={**os.environ, VARIABLE: "1" if identity else "0"},
                process_group=0,  # Ctrl-C reaches the parent alone: it drains, and then ends its nodes
            )
            undo.pop_all()
        self._watcher = threading.Thread(target=self._watch, args=(ended,), name=f"mdi-watch-{name}", daemon=True)
        self._watcher.start()

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def address(self, deadline: float) -> str:
        """Waits for the line in which a node names its port. Raises LinkError when it ends, or `deadline` passes."""
        assert self._process.stdout
        while not select.select([self._process.stdout], [], [], 0.1)[0]:
            if time.monotonic() > deadline:
                raise LinkError(f"node {self.name} did not start in time", self.name)
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            raise self.death()
        self._certs.cleanup()
        return f"127.0.0.1:{json.loads(line)['port']}"

    def death(self) -> LinkError:
        """Why it ended: exit code and last line of its log."""
        size = os.fstat(self._log.fileno()).st_size
        tail = os.pread(self._log.fileno(), TAIL_BYTES, max(0, size - TAIL_BYTES))
        lines = tail.decode(errors="replace").strip().splitlines()
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
        assert self._process.stdout
        self._process.stdout.close()
        self._certs.cleanup()
        self._log.close()

    def _watch(self, ended: Callable[[NodeProcess], None]) -> None:
        self._process.wait()
        ended(self)
