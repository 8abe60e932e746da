"""The link between any two nodes, measured by the nodes themselves, which run in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from testing.nodes import node_here

from mdi.checkpoint.cache import Cache
from mdi.cluster.measure import measure_link
from mdi.cluster.node_client import NodeAddress, NodeClient
from mdi.core.errors import LinkError
from mdi.node.settings import NodeSettings
from mdi.planning.hardware import LinkSpeed
from mdi.rpc import measure_link as measuring
from mdi.rpc.authority import Authority
from mdi.rpc.group_join import LinkListener, Member
from mdi.rpc.group_link import GroupLink
from mdi.rpc.tls import Identity


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority.create()


@pytest.fixture(params=["encrypted", "plain"])
def starter(request: pytest.FixtureRequest, authority: Authority) -> Identity | None:
    """The starter's identity; None without encryption."""
    return authority.issue("starter") if request.param == "encrypted" else None


@pytest.fixture
def nodes(starter: Identity | None, authority: Authority, tmp_path: Path) -> Iterator[list[NodeAddress]]:
    """Two nodes that wait for weights."""
    with ExitStack() as stack:
        found = list[NodeAddress]()
        for name in ("secondary0", "finisher"):
            cache, identity = Cache(tmp_path / name, 2**20), authority.issue(name) if starter else None
            settings = NodeSettings(name, None, "127.0.0.1:0", cache=cache, identity=identity)
            found.append(NodeAddress(name, stack.enter_context(node_here(settings))))
        yield found


def measured(nodes: list[NodeAddress], starter: Identity | None) -> LinkSpeed:
    """The link between these two; of one, that of the starter to it."""

    async def measure() -> LinkSpeed:
        clients = [NodeClient(node, starter) for node in nodes]
        try:
            return await measure_link(clients[0] if len(clients) > 1 else None, clients[-1], starter)
        finally:
            for client in clients:
                await client.close()

    return asyncio.run(measure())


@pytest.mark.parametrize("count", [1, 2])
def test_the_link_of_two_nodes_is_measured(count: int, nodes: list[NodeAddress], starter: Identity | None) -> None:
    speed = measured(nodes[-count:], starter)
    assert 1e-6 < speed.rtt_s < 1
    assert 1e6 < speed.bytes_per_s < 1e12


def test_a_node_that_cannot_be_connected_to_is_named(nodes: list[NodeAddress], starter: Identity | None) -> None:
    async def measure() -> LinkSpeed:
        async with NodeClient(nodes[0], starter) as client:
            return await client.measure_link(Member("finisher", "127.0.0.1", 1))

    with pytest.raises(LinkError, match=r"node finisher at 127\.0\.0\.1:1: Connection refused") as error:
        asyncio.run(measure())
    assert error.value.node == "secondary0"


def test_a_link_that_is_too_slow_to_be_measured_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other side joins, and then says nothing."""
    monkeypatch.setattr(measuring, "TIMEOUT_S", 0.2)
    listener = LinkListener(None, "127.0.0.1")
    members = [Member("starter"), Member("finisher", "127.0.0.1", listener.port)]
    with ThreadPoolExecutor() as pool:
        silent = pool.submit(GroupLink.join, 1, members, measuring.RANKS, listener, None, 0, 20.0)
        with pytest.raises(LinkError, match="the link is too slow to be measured"):
            measuring.measure_link("starter", members[1], None)
        silent.result().close()
