"""Starts node processes on this machine, watches them, and makes sure none outlives its parent."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Sequence
from pathlib import Path

from mdi.cluster.launchers.base import Died
from mdi.cluster.launchers.process import NodeProcess
from mdi.cluster.node_client import NodeAddress
from mdi.core.errors import LinkError
from mdi.rpc.authority import AUTHORITY_DAYS, Authority

START_TIMEOUT_S = 60.0
END_TIMEOUT_S = 5.0
HOST = "127.0.0.1"


class LocalLauncher:
    """A `Launcher` of one node process per chunk. Nodes that listen may still be loading.

    With an authority their links are encrypted.
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
            options = ["--chunk", str(self._chunks[name]), *self._options]
            try:
                self._processes[name] = NodeProcess(name, options, HOST, identity, self._report)
            except OSError as error:
                raise LinkError(f"node {name} could not be started ({error.strerror})", name) from None
            return before

    def _report(self, process: NodeProcess) -> None:
        with self._lock:
            if self._died and not self._closing and self._processes[process.name] is process:
                self._died(process.death())
