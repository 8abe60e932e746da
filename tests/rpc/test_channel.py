"""Who gets through to a node and who does not: real servers on loopback."""

from __future__ import annotations

import grpc
import pytest
from testing.links import call_node, fake_node, refused

from mdi.rpc import channel, node_pb2
from mdi.rpc.diagnose import diagnose
from mdi.rpc.tls import Identity


def test_nodes_of_one_authority_talk_and_know_who_the_other_is(server: str, starter: Identity) -> None:
    assert call_node(server, "finisher", starter) == [
        node_pb2.NodeStatus(node="finisher", role="finisher", error="starter", state=node_pb2.NodeStatus.LOADED)
    ]
    assert diagnose(server, "finisher", starter) is None


def test_nodes_in_the_clear_talk() -> None:
    with fake_node(None) as address:
        assert call_node(address, "finisher", None) == [
            node_pb2.NodeStatus(node="finisher", role="finisher", state=node_pb2.NodeStatus.LOADED)
        ]
        assert diagnose(address, "finisher", None) is None


def test_a_client_without_a_certificate_is_refused(
    server: str, starter: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        channel, "channel_credentials", lambda identity: grpc.ssl_channel_credentials(identity.authority)
    )
    assert refused(server, "finisher", starter) is grpc.StatusCode.UNAVAILABLE
