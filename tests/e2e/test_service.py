"""Server and node as services, from units of `mdi service`: stopped, killed and started again, they always answer."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from testing.links import free_port
from testing.processes import ENVIRONMENT
from testing.supervisor import Service
from testing.units import read_unit
from testing.waiting import wait_for

from mdi import Engine, SamplingParams
from mdi.checkpoint.prepare import prepare
from mdi.checkpoint.source import open_source
from mdi.cli import app

CYCLES = int(os.environ.get("MDI_SERVICE_CYCLES", "3"))
BODY = {"prompt": "Who are you?", "max_tokens": 8, "temperature": 1, "seed": 4}
CERTIFICATES = ("certs init", "certs node starter", "certs node secondary0")
UNITS = (
    "service --to units secondary 0 --nodes-config nodes.json --cache-folder cache --threads 1",
    "service --to units serve model --nodes-config nodes.json --port {port}",
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120 + 60 * CYCLES)]


class Pair:
    """A server and its node, each a service, in a folder."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port = folder, port
        (temporary := folder / "tmp").mkdir()
        environment = {**ENVIRONMENT, "TMPDIR": str(temporary)}
        self.server, self.node = (
            Service(name, read_unit(folder / "units" / f"{name}.service"), environment, folder / f"{name}.log")
            for name in ("mdi-server", "mdi-finisher")
        )

    @property
    def chunks(self) -> list[tuple[str, int, int]]:
        """The node's weights. A file that was sent again is another one."""
        files = sorted((self.folder / "cache").rglob("*.safetensors"))
        return [(path.name, path.stat().st_ino, path.stat().st_mtime_ns) for path in files]

    @property
    def files(self) -> list[Path]:
        return sorted(path for path in self.folder.rglob("*") if path.is_file())

    def answer(self) -> str:
        """Asks until there is an answer, as a client that tries again."""
        deadline = time.monotonic() + 100
        while True:
            try:
                answer = httpx.post(f"http://127.0.0.1:{self.port}/generate", json=BODY, timeout=60)
                if answer.status_code == 200:
                    return str(answer.json()["samples"][0])
            except httpx.TransportError:
                pass
            assert time.monotonic() < deadline, f"{self.server.log()}\n\n{self.node.log()}"
            time.sleep(0.1)

    def stop_and_start_the_server_first(self) -> None:
        assert (self.server.stop(), self.node.stop()) == (0, 0)
        self.server.start()
        time.sleep(1)
        self.node.start()

    def stop_and_start_the_node_first(self) -> None:
        assert (self.node.stop(), self.server.stop()) == (0, 0)
        self.node.start()
        time.sleep(1)
        self.server.start()

    def cut_the_power(self) -> None:
        self.server.kill()
        self.node.kill()

    def cut_the_power_twice(self) -> None:
        self.cut_the_power()
        time.sleep(random.Random(len(self.server.exits)).uniform(2, 6))
        self.cut_the_power()

    def kill_the_node(self) -> None:
        self.node.kill()

    def kill_the_server(self) -> None:
        self.server.kill()

    def take_the_address_for_a_while(self) -> None:
        self.server.stop()
        with socket.create_server(("127.0.0.1", self.port)):
            n_exits = len(self.server.exits)
            self.server.start()
            wait_for(lambda: len(self.server.exits) > n_exits, 60)
        assert self.server.exits[-1] == 2


TROUBLES: list[Callable[[Pair], None]] = [
    Pair.cut_the_power,
    Pair.take_the_address_for_a_while,
    Pair.stop_and_start_the_server_first,
    Pair.cut_the_power_twice,
    Pair.kill_the_node,
    Pair.stop_and_start_the_node_first,
    Pair.kill_the_server,
]


@pytest.fixture
def alone(tiny_checkpoint: Path) -> str:
    """What one process answers."""
    with Engine(tiny_checkpoint) as engine:
        return engine.chat(str(BODY["prompt"]), SamplingParams(max_tokens=8, temperature=1, seed=4)).text


@pytest.fixture
def pair(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ENABLE_ENCRYPTION", "1")
    shutil.copytree(tiny_checkpoint, "model", ignore=shutil.ignore_patterns("chunks"))
    prepare(open_source(Path("model")), 2)
    starter, secondary = ({"addr": "127.0.0.1", "communication": {"port": free_port()}} for _ in range(2))
    Path("nodes.json").write_text(json.dumps({"nodes": {"starter": starter, "secondary": [secondary]}}))
    port = free_port()
    for words in (*CERTIFICATES, *UNITS):
        monkeypatch.setattr(sys, "argv", ["mdi", *words.format(port=port).split()])
        with pytest.raises(SystemExit) as ended:
            app.main()
        assert not ended.value.code
    pair = Pair(tmp_path, port)
    try:
        yield pair
    finally:
        for service in (pair.server, pair.node):
            service.end()


def test_every_start_answers_sends_no_weight_twice_and_leaves_nothing_behind(pair: Pair, alone: str) -> None:
    pair.server.start()
    pair.node.start()
    assert pair.answer() == alone
    chunks, files = pair.chunks, pair.files
    assert [name for name, *_ in chunks] == ["model_finisher.safetensors"]
    for cycle in range(CYCLES):
        trouble = TROUBLES[cycle % len(TROUBLES)]
        trouble(pair)
        assert pair.answer() == alone, trouble.__name__
        assert pair.chunks == chunks, trouble.__name__
        assert pair.files == files, trouble.__name__
        assert [len(service.processes) for service in (pair.server, pair.node)] == [1, 1], trouble.__name__
    assert (pair.server.stop(), pair.node.stop()) == (0, 0)
    assert pair.files == files
    assert not any(service.processes for service in (pair.server, pair.node))
    assert list((pair.folder / "tmp").iterdir()) == []
