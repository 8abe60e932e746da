"""Nodes under bad conditions: proxies in the environment, a parent that is killed, slow links, freezes."""

from __future__ import annotations

import asyncio
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import psutil
import pytest
import torch
from testing.checkpoints import tiny_config
from testing.links import RecordingProxy, fake_node, raw_server
from testing.nodes import node_here
from testing.own_link import OwnLink
from testing.processes import ENVIRONMENT, Process, mdi
from testing.waiting import wait_for

from mdi.checkpoint.manifest import Manifest, chunk_file
from mdi.checkpoint.prepare import prepare
from mdi.checkpoint.source import open_source
from mdi.cluster.delivery import Delivery
from mdi.cluster.link import PipelineSettings
from mdi.cluster.node_client import NodeAddress, NodeClient
from mdi.core.batch import Batch, Result, Slice, TokenSampling
from mdi.core.errors import LinkError
from mdi.node.settings import NodeSettings
from mdi.rpc import node_pb2
from mdi.rpc.authority import Authority
from mdi.rpc.channel import spoken
from mdi.rpc.tls import Identity

PROXY_VARIABLES = ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
SLOW = 12_500.0  # bytes a second
GREEDY = TokenSampling(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, sample=0, position=0)
HOLDS_THE_GIL = """
import ctypes
from mdi.cli.parent import end_with_parent
end_with_parent()
print("watches", flush=True)
ctypes.PyDLL(None).sleep(100)
"""
COMPUTES_TO_THE_END = """
import sys, threading, time
import torch
from mdi.cli.app import app
from mdi.node import server

def compute():
    matrix = torch.randn(64, 64)
    while True:
        torch.softmax(matrix @ matrix, -1)

def serve_node(settings):
    threading.Thread(target=compute, daemon=True).start()
    time.sleep(0.3)

server.serve_node = serve_node
app(["secondary", "--role", "finisher"])
"""


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """A proxy that all variables of the environment name; set when something connects to it."""
    asked = threading.Event()
    with raw_server(lambda _: asked.set()) as address:
        for name in PROXY_VARIABLES:
            monkeypatch.setenv(name, f"http://{address}")
        monkeypatch.setenv("GRPC_ADDRESS_HTTP_PROXY", address)
        monkeypatch.setenv("GRPC_ADDRESS_HTTP_PROXY_ENABLED_ADDRESSES", "127.0.0.0/8")
        yield asked


@pytest.fixture
def identities(request: pytest.FixtureRequest) -> tuple[Identity | None, Identity | None]:
    """The starter's and the finisher's; None where links are in the clear."""
    if not request.param:
        return None, None
    authority = Authority.create()
    return authority.issue("starter"), authority.issue("finisher")


@pytest.mark.parametrize("identities", [False, True], ids=["in the clear", "encrypted"], indirect=True)
def test_links_never_use_a_proxy_of_the_environment(
    proxy: threading.Event, identities: tuple[Identity | None, Identity | None]
) -> None:
    """B8: nor one that is set for gRPC alone."""
    starter, finisher = identities

    async def ask(address: str) -> str:
        async with NodeClient(NodeAddress("finisher", address), starter) as client:
            return (await client.status(30, wait_for_ready=True)).node

    with fake_node(finisher) as address:
        assert asyncio.run(ask(address)) == "finisher"
    assert not proxy.is_set()


@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "SSL_CERT_DIR", "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH"])
def test_links_trust_their_own_authority_whatever_the_environment_names(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B8: certificates of the environment are for others."""
    monkeypatch.setenv(variable, "/no/such/place")
    authority = Authority.create()

    async def ask(address: str) -> str:
        async with NodeClient(NodeAddress("finisher", address), authority.issue("starter")) as client:
            return (await client.status(30, wait_for_ready=True)).node

    with fake_node(authority.issue("finisher")) as address:
        assert asyncio.run(ask(address)) == "finisher"


def test_a_node_that_is_told_to_end_while_it_computes_ends_without_a_crash() -> None:
    """Threads that Python ends with itself cannot leave torch's code: the process was aborted, now and then."""
    environment = {**ENVIRONMENT, "ENABLE_ENCRYPTION": "0"}
    done = subprocess.run([sys.executable, "-c", COMPUTES_TO_THE_END], env=environment, capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.slow
@pytest.mark.parametrize("encryption", ["0", "1"], ids=["in the clear", "encrypted"])
def test_a_model_over_several_nodes_answers_where_a_proxy_is_set(
    encryption: str, proxy: threading.Event, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B8: starter to node, node to node, and node to starter."""
    for name in (*PROXY_VARIABLES, "GRPC_ADDRESS_HTTP_PROXY", "GRPC_ADDRESS_HTTP_PROXY_ENABLED_ADDRESSES"):
        monkeypatch.setitem(ENVIRONMENT, name, os.environ[name])
    monkeypatch.setitem(ENVIRONMENT, "ENABLE_ENCRYPTION", encryption)
    done = mdi("ask", tiny_checkpoint, "hi", "--n-nodes", "3", "--max-tokens", "3")
    assert done.returncode == 0, done.stderr
    assert not proxy.is_set()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel sends this signal on Linux only")
def test_a_node_ends_with_its_parent_while_an_import_holds_the_interpreter() -> None:
    """D9: loading torch's libraries keeps every thread of Python waiting."""
    with subprocess.Popen([sys.executable, "-c", HOLDS_THE_GIL], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as node:
        assert node.stdout
        assert node.stdin
        assert node.stdout.readline() == b"watches\n"
        node.stdin.close()
        assert node.wait(30) == -signal.SIGKILL


def test_a_node_whose_parent_has_ended_before_it_began_ends_too() -> None:
    """D9: between fork and exec nothing of the node runs yet."""
    code = "from mdi.cli.parent import end_with_parent; end_with_parent(); import time; time.sleep(100)"
    assert subprocess.run([sys.executable, "-c", code], stdin=subprocess.DEVNULL, timeout=60).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("delay_s", [0.0, 0.5, 2.0])
def test_nodes_end_with_a_starter_that_is_killed_while_they_begin(delay_s: float, tiny_checkpoint: Path) -> None:
    """D9: nodes that import torch ended up to ten seconds after their starter."""
    starter = Process(["ask", tiny_checkpoint, "hi", "--n-nodes", "3"])
    try:
        wait_for(lambda: len(_nodes_of(starter)) == 2)
        nodes = _nodes_of(starter)
        threading.Event().wait(delay_s)
    finally:
        starter.kill()
    wait_for(lambda: not any(map(_runs, nodes)), 5)


@pytest.fixture
def distant(tiny_checkpoint: Path, tmp_path: Path) -> Iterator[Callable[[float | None], Distant]]:
    """Begins a pipeline of three whose finisher both others reach over a link of so many bytes a second."""
    with ExitStack() as undo:

        def begin(bytes_per_s: float | None) -> Distant:
            folder = prepare(open_source(tiny_checkpoint), 3)
            names = ("secondary0", "finisher")
            here = [
                undo.enter_context(node_here(NodeSettings(name, folder / chunk_file(name), listen="127.0.0.1:0")))
                for name in names
            ]
            proxy = undo.enter_context(closing(RecordingProxy(here[1], bytes_per_s)))
            inbox = queue.SimpleQueue[Delivery]()
            nodes = [NodeAddress("secondary0", here[0]), NodeAddress("finisher", proxy.address)]
            settings = PipelineSettings(Manifest.read(folder).digest, n_slots=4, sequence_length=1200)
            link = undo.enter_context(closing(OwnLink(nodes, settings, inbox.put)))
            return Distant(proxy, link, inbox)

        yield begin


@dataclass(frozen=True)
class Distant:
    """A link to nodes of which the finisher is behind a proxy, and what it has delivered."""

    proxy: RecordingProxy
    link: OwnLink
    inbox: queue.SimpleQueue[Delivery]

    def send(self, batch_id: int, n_tokens: int) -> None:
        part = Slice(batch_id, 0, n_tokens, (GREEDY,))
        batch = Batch(batch_id, (part,), torch.arange(n_tokens).repeat(3, 1))
        self.link.send(batch, torch.zeros(n_tokens, tiny_config()["hidden_size"]))


@pytest.mark.slow
def test_what_is_being_sent_over_a_slow_link_is_not_silence(distant: Callable[[float | None], Distant]) -> None:
    """B7: a batch that takes many heartbeats to arrive loses no node, and neither does one behind it."""
    pipeline = distant(SLOW)
    pipeline.send(0, 1120)
    pipeline.send(1, 16)
    for batch_id in range(2):
        event = pipeline.inbox.get(timeout=120)
        assert isinstance(event, Result), event
        assert event.batch_id == batch_id
    assert pipeline.inbox.empty()


def test_a_link_that_carries_nothing_any_more_is_a_loss_with_its_reason(
    distant: Callable[[float | None], Distant],
) -> None:
    """B7: also when no connection breaks."""
    pipeline = distant(None)
    pipeline.send(0, 16)
    assert isinstance(pipeline.inbox.get(timeout=60), Result)
    pipeline.proxy.swallow()
    loss = pipeline.inbox.get(timeout=20)
    assert isinstance(loss, LinkError)
    assert re.fullmatch(r"node finisher was silent for 3 s|the link .*to node finisher broke: .*\w.*", str(loss))
    assert "did it end?" not in str(loss)


def test_a_process_that_was_frozen_does_not_take_its_own_absence_for_silence() -> None:
    """D14: after a freeze all its timers have run out at once, and the answers are still to be read."""

    async def beats() -> AsyncIterator[node_pb2.NodeStatus]:
        for _ in range(3):
            await asyncio.sleep(0.1)
            yield node_pb2.NodeStatus()

    async def listen() -> int:
        heard = 0
        async for _ in spoken(beats()):
            heard += 1
            asyncio.get_running_loop().call_later(0.05, time.sleep, 2.5)  # nothing of this process runs meanwhile
        return heard

    with patch("mdi.rpc.channel.SILENCE_S", 2):
        assert asyncio.run(listen()) == 3


def test_a_node_that_says_nothing_is_silent() -> None:
    """D14: and the loss has that reason."""

    async def beats() -> AsyncIterator[node_pb2.NodeStatus]:
        yield node_pb2.NodeStatus()
        await asyncio.sleep(1000)

    async def listen() -> None:
        async for _ in spoken(beats()):
            pass

    with patch("mdi.rpc.channel.SILENCE_S", 1), pytest.raises(LinkError, match="it was silent for 1 s"):
        asyncio.run(listen())


@pytest.mark.slow
def test_a_slow_link_that_dies_while_it_is_full_is_a_loss(distant: Callable[[float | None], Distant]) -> None:
    """B7: progress that has ended is none."""
    pipeline = distant(SLOW)
    pipeline.send(0, 1120)
    wait_for(lambda: pipeline.proxy.passed_bytes > 40_000)
    pipeline.proxy.swallow()
    assert isinstance(pipeline.inbox.get(timeout=30), LinkError)


def _nodes_of(starter: Process) -> list[psutil.Process]:
    children = psutil.Process(starter.popen.pid).children()
    return [child for child in children if _runs(child) and "secondary" in child.cmdline()]


def _runs(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
