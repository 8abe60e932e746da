"""Nodes under bad conditions: proxies in the environment, a parent that is killed, slow links, freezes."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from testing.links import fake_node, raw_server
from testing.processes import ENVIRONMENT, Process, mdi
from testing.waiting import wait_for

from mdi.cluster.node_client import NodeAddress, NodeClient
from mdi.rpc.authority import Authority
from mdi.rpc.tls import Identity

PROXY_VARIABLES = ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
HOLDS_THE_GIL = """
import ctypes
from mdi.cli.parent import end_with_parent
end_with_parent()
print("watches", flush=True)
ctypes.PyDLL(None).sleep(100)
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


def _nodes_of(starter: Process) -> list[psutil.Process]:
    children = psutil.Process(starter.popen.pid).children()
    return [child for child in children if _runs(child) and "secondary" in child.cmdline()]


def _runs(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
