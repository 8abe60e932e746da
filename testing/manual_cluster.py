"""Nodes for the manual launcher: nodes-config, certificates from `mdi certs`, and a process for each node."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from mdi.checkpoint.manifest import chunk_file
from mdi.cli.app import app
from mdi.rpc.sockets import host_and_port
from testing.links import RecordingProxy, free_port
from testing.processes import ENVIRONMENT, Process

NODES = ("secondary0", "finisher")
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Place:
    """Where a node runs. inside: a context; a process that is started in it runs there."""

    address: str
    port: int
    inside: Callable[[], AbstractContextManager[None]] = nullcontext


def on_loopback(*names: str) -> dict[str, Place]:
    """Places for a starter and these nodes on this machine, each with a free port."""
    return {name: Place(LOOPBACK, free_port()) for name in ("starter", *names)}


class ManualCluster:
    """The nodes of one cluster. None runs at first; all are killed at the end of the context.

    places: by the node's name; "starter" is there, but nothing is started for it. A spare is "spare0", the node with
    the vision tower "vision", all others are stages in this order.
    chunks: the folder with the nodes' chunks. Without it, nodes start without weights and keep those that they receive
    in `cache(name)`.
    planned: the plan may group nodes, and leave some out; without it each has a stage.
    slow_bytes_per_s: the starter reaches each node through one of `links`, which passes so many bytes a second.
    """

    def __init__(
        self,
        folder: Path,
        places: Mapping[str, Place],
        *,
        chunks: Path | None = None,
        encrypted: bool = False,
        planned: bool = False,
        slow_bytes_per_s: float | None = None,
    ) -> None:
        self.places = dict(places)
        self.encrypted = encrypted
        self.environment = {**ENVIRONMENT, "ENABLE_ENCRYPTION": str(int(encrypted))}
        self.links: dict[str, RecordingProxy] = {}
        self._folder = folder
        self._planned = planned
        self._chunks = chunks
        self._running: dict[str, Process] = {}
        self._lines: dict[str, list[list[str]]] = {}
        self._undo = ExitStack()
        if encrypted:
            _make_certificates(folder, self.places)
        if slow_bytes_per_s:
            for name in self.names:
                self.links[name] = link = RecordingProxy(
                    f"{places[name].address}:{places[name].port}", slow_bytes_per_s
                )
                self._undo.callback(link.close)
        self.config = folder / "nodes.json"
        self.config.write_text(json.dumps({"nodes": self._config()}))

    def __enter__(self) -> ManualCluster:
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    @property
    def names(self) -> list[str]:
        """All nodes but the starter."""
        return [name for name in self.places if name != "starter"]

    @property
    def stages(self) -> list[str]:
        """The nodes with layers, in their order."""
        return [name for name in self.names if name != "vision" and not name.startswith("spare")]

    @property
    def keys(self) -> list[Path]:
        """All private keys, the authority's among them."""
        return list((self._folder / "certs").glob("*.key"))

    @property
    def starter_options(self) -> list[str | Path]:
        """Options that let `mdi ask` and `mdi serve` use these nodes."""
        return ["--nodes-config", self.config, *self._security("starter")]

    def certs(self, name: str) -> Path:
        """The folder with a node's own certificate and key."""
        return self._folder / f"certs-{name}"

    def cache(self, name: str) -> Path:
        return self._folder / f"cache-{name}"

    def log(self, name: str) -> str:
        """What a node has written to standard error, over all its lives."""
        return "".join(line for lines in self._lines[name] for line in lines)

    def process(self, name: str) -> Process:
        """The node's last process."""
        return self._running[name]

    def start(self, name: str, *options: str | Path) -> Process:
        """Starts a node, and does not wait until it listens. Its last process is killed if it still runs."""
        if name in self._running:
            self._running[name].kill()
        words: list[str | Path] = ["secondary", "--nodes-config", self.config, *self._place(name), "--threads", "1"]
        words += ["--chunk", self._chunks / chunk_file(name)] if self._chunks else ["--cache-folder", self.cache(name)]
        if name in self.links:  # the nodes-config has the link's port
            words += ["--listen", f"{self.places[name].address}:{self.places[name].port}"]
        with self.places[name].inside():
            self._running[name] = process = self.run(*words, *self._security(name), *options)
        self._lines.setdefault(name, []).append(process.lines)
        return process

    def start_all(self) -> dict[str, Process]:
        return {name: self.start(name) for name in self.names}

    def ask(self, checkpoint: Path, *words: str) -> Process:
        """Starts `mdi ask` over these nodes."""
        return self.run("ask", checkpoint, *words, *self.starter_options, "--wait-s", "100")

    def run(self, *words: str | Path) -> Process:
        """Starts a command that is killed at the end, too."""
        process = Process(words, self.environment)
        self._undo.callback(process.kill)
        return process

    def _place(self, name: str) -> Sequence[str]:
        if name == "vision":
            return ("--vision",)
        return ("--spare", name.removeprefix("spare")) if name.startswith("spare") else (str(self.stages.index(name)),)

    def _security(self, name: str) -> Sequence[str | Path]:
        if self.encrypted:
            return ("--certs", self.certs(name))
        return () if self.places[name].address == LOOPBACK else ("--insecure",)

    def _config(self) -> dict[str, Any]:
        places = {name: f"{place.address}:{place.port}" for name, place in self.places.items()}
        places |= {name: link.address for name, link in self.links.items()}
        entries = dict[str, dict[str, Any]]()
        for name, place in places.items():
            host, port = host_and_port(place)
            entries[name] = {"addr": host, "communication": {"port": port}}
        vision = {"vision": entries["vision"]} if "vision" in entries else {}
        spares = [entry for name, entry in entries.items() if name.startswith("spare")]
        if not self._planned:
            for group, name in enumerate(["starter", *self.stages]):
                entries[name]["group"] = group
        stages = [entries[name] for name in self.stages]
        return {"starter": entries["starter"], "secondary": stages, "spare": spares, **vision}


def _make_certificates(folder: Path, places: Mapping[str, Place]) -> None:
    """One folder with all certificates, and for each node a copy of its own."""
    certs = folder / "certs"
    _mdi("certs", "init", "--folder", str(certs))
    for name, place in places.items():
        _mdi("certs", "node", name, "--addr", place.address, "--folder", str(certs))
        own = folder / f"certs-{name}"
        own.mkdir()
        for file in ("ca.pem", f"{name}.pem", f"{name}.key"):
            shutil.copy(certs / file, own)


def _mdi(*words: str) -> None:
    """Runs a command in this process, which is faster than starting one."""
    done = CliRunner().invoke(app, words)
    if done.exit_code:
        raise RuntimeError(f"mdi {' '.join(words)} failed: {done.output}")
