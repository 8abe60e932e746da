"""A cluster started by hand on this machine, for tests: nodes-config, certificates, processes, slow links."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mdi.rpc.authority import create_authority, create_node
from testing.commands import ENVIRONMENT
from testing.links import Recorder, free_port

NAMES = ("secondary0", "finisher")


class Process:
    """A command that runs, and what it says on its standard error."""

    def __init__(self, words: Sequence[str | Path], encrypted: bool) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "mdi", *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env={**ENVIRONMENT, "ENABLE_ENCRYPTION": str(int(encrypted))},
        )
        self.said: list[str] = []
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def says(self, words: str, timeout_s: float = 120) -> str:
        """Waits for a line with these words, and gives it."""

        def found() -> str | None:
            return next((line for line in self.said if words in line), None)

        with self._changed:
            assert self._changed.wait_for(lambda: found() or self._ended, timeout_s), "".join(self.said)
            line = found()
        assert line, "".join(self.said)
        return line

    def close(self) -> None:
        self.popen.kill()
        self.popen.wait()
        self._reader.join()
        assert self.popen.stdout
        assert self.popen.stderr
        self.popen.stdout.close()
        self.popen.stderr.close()

    _ended = False

    def _read(self) -> None:
        assert self.popen.stderr
        for line in self.popen.stderr:
            with self._changed:
                self.said.append(line)
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()


class Machines:
    """Two nodes, spares and a vision node, each with a port, a cache folder and certificates of its own; none runs yet.

    slow: the starter reaches nodes only through links that pass so many bytes a second.
    """

    def __init__(
        self,
        root: Path,
        undo: ExitStack,
        *,
        names: Sequence[str] = NAMES,
        spares: int = 0,
        vision: bool = False,
        encrypted: bool = False,
        slow: float | None = None,
    ) -> None:
        self.root = root
        self.encrypted = encrypted
        self._undo = undo
        self.ports = {
            name: free_port() for name in (*names, *["vision"] * vision, *(f"spare{index}" for index in range(spares)))
        }
        self.links: dict[str, Recorder] = {}
        if slow:
            self.links = {name: Recorder(f"127.0.0.1:{port}", slow) for name, port in self.ports.items()}
            for link in self.links.values():
                undo.callback(link.close)
        seen = {name: int(link.address.split(":")[1]) for name, link in self.links.items()} or self.ports
        entries = {
            name: {"addr": "127.0.0.1", "communication": {"port": port}}
            for name, port in {"starter": 1, **seen}.items()
        }
        nodes: dict[str, Any] = {
            "starter": entries["starter"],
            "secondary": [entries[name] for name in names],
            "spare": [entry for name, entry in entries.items() if name.startswith("spare")],
        }
        if vision:
            nodes["vision"] = entries["vision"]
        self.config = root / "nodes.json"
        self.config.write_text(json.dumps({"nodes": nodes}))
        if encrypted:
            create_authority(root / "certs")
            for name in entries:
                create_node(root / "certs", name)

    def cache(self, name: str) -> Path:
        return self.root / f"cache-{name}"

    def node(self, name: str, *options: str | Path) -> Process:
        """Starts a node, or a spare."""
        if name == "vision":
            place: tuple[str, ...] = ("--vision",)
        elif name.startswith("spare"):
            place = ("--spare", name.removeprefix("spare"))
        else:
            place = (str(NAMES.index(name)),)
        words: list[str | Path] = ["secondary", "--nodes-config", self.config, *place]
        words += ["--cache-folder", self.cache(name), "--listen", f"127.0.0.1:{self.ports[name]}", "--threads", "1"]
        return self.run(*words, *options)

    def run(self, *words: str | Path) -> Process:
        certs = ("--certs", self.root / "certs") if self.encrypted else ()
        process = Process([*words, *certs], self.encrypted)
        self._undo.callback(process.close)
        return process

    def ask(self, checkpoint: Path, *words: str) -> Process:
        return self.run("ask", checkpoint, *words, "--nodes-config", self.config, "--wait-s", "120")
