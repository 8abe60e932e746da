"""Nodes as people start them by hand, one on each machine: `mdi secondary`, with certificates made by `mdi certs`."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from typer.testing import CliRunner

from mdi.checkpoint.prepare import prepare
from mdi.checkpoint.source import open_source
from mdi.cli.app import app

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}


@dataclass(frozen=True)
class Machine:
    """Where a node runs. inside: processes that are started within are started there."""

    addr: str
    port: int
    inside: Callable[[], AbstractContextManager[None]] = nullcontext


class NodesByHand:
    """The nodes of a model split over machines, none of them started yet. Close it, and none is left.

    machines: the starter's first, where nothing is started. config: the nodes-config, written into `folder`, as are
    certificates (`certs` by node; without encryption, nodes need --insecure) and a log for each node.
    """

    def __init__(self, checkpoint: Path, folder: Path, machines: Sequence[Machine], *, encrypted: bool) -> None:
        self.names = [*(f"secondary{index}" for index in range(len(machines) - 2)), "finisher"]
        self.config = folder / "nodes.json"
        self.environment = {**ENVIRONMENT, "ENABLE_ENCRYPTION": "1" if encrypted else "0"}
        self._folder = folder
        self._machines = dict(zip(self.names, machines[1:], strict=True))
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self.encrypted = encrypted
        self._chunks = prepare(open_source(checkpoint), len(machines))
        _write_config(self.config, machines)
        if encrypted:
            _make_certificates(folder, ["starter", *self.names])

    def __enter__(self) -> NodesByHand:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def certs(self, name: str) -> Path:
        """The folder that this node has of all certificates."""
        return self._folder / f"certs-{name}"

    @property
    def keys(self) -> list[Path]:
        """All private keys, the authority's among them."""
        return list((self._folder / "certs-made").glob("*.key"))

    def log(self, name: str) -> str:
        """What the node has written on its screen, over all its lives."""
        return (self._folder / f"{name}.log").read_text()

    def pid(self, name: str) -> int:
        return self._processes[name].pid

    def start(self, name: str) -> None:
        """Starts a node that does not run; does not wait for it."""
        words = [sys.executable, "-m", "mdi", "secondary", str(self.names.index(name))]
        words += ["--nodes-config", str(self.config), "--chunk", str(self._chunks / f"model_{name}.safetensors")]
        words += ["--certs", str(self.certs(name))] if self.encrypted else ["--insecure"]
        with (self._folder / f"{name}.log").open("ab") as log, self._machines[name].inside():
            self._processes[name] = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log, env=self.environment
            )

    def send(self, name: str, number: int) -> None:
        """Sends a node a signal."""
        os.kill(self.pid(name), number)

    def kill(self, name: str) -> None:
        """Ends a node at once (SIGKILL)."""
        self.send(name, signal.SIGKILL)
        self._processes[name].wait()

    def close(self) -> None:
        for process in self._processes.values():
            process.kill()
            process.wait()


def _write_config(path: Path, machines: Sequence[Machine]) -> None:
    starter, *others = [{"addr": machine.addr, "communication": {"port": machine.port}} for machine in machines]
    path.write_text(json.dumps({"nodes": {"starter": starter, "secondary": others}}))


def _make_certificates(folder: Path, names: Sequence[str]) -> None:
    made = folder / "certs-made"
    _mdi("certs", "init", "--folder", str(made))
    for name in names:
        _mdi("certs", "node", name, "--folder", str(made))
        copies = folder / f"certs-{name}"
        copies.mkdir()
        for file in ("ca.pem", f"{name}.pem", f"{name}.key"):
            shutil.copy(made / file, copies)


def _mdi(*words: str) -> None:
    """A command in this process: starting one takes longer than these last."""
    done = CliRunner().invoke(app, words)
    if done.exit_code:
        raise RuntimeError(f"mdi {' '.join(words)} failed: {done.output}")
