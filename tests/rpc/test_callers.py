"""Every method of the service, called by every kind of node with a certificate: only the one that may gets through."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from testing.links import call_node, node_server

from mdi.rpc import authority as certificates
from mdi.rpc.authority import Authority
from mdi.rpc.callers import CALLERS, SERVICE, Caller, complete
from mdi.rpc.node_pb2_grpc import NodeServicer

METHODS = sorted(method.name for method in SERVICE.methods)
PREVIOUS = "secondary1"
NODES = ("starter", "secondary0", "secondary1", "finisher", "vision", "spare0")


class Recording(NodeServicer):
    """Answers every method, and keeps the names of those that were entered and how many messages were read."""

    def __init__(self) -> None:
        self.entered: list[str] = []
        self.read = 0
        for method in SERVICE.methods:
            setattr(self, method.name, self._handler(method.name, method.client_streaming, method.server_streaming))

    def _handler(self, name: str, streams_in: bool, streams_out: bool) -> Any:
        reply = GetMessageClass(SERVICE.methods_by_name[name].output_type)

        async def take(request: Any) -> None:
            self.entered.append(name)
            if streams_in:
                async for _ in request:
                    self.read += 1

        async def answer(request: Any, _context: object) -> Message:
            await take(request)
            return reply()

        async def answers(request: Any, _context: object) -> AsyncIterator[Message]:
            await take(request)
            yield reply()

        return answers if streams_out else answer


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority.create()


@pytest.fixture(scope="module")
def node() -> Recording:
    return Recording()


@pytest.fixture(scope="module")
def address(authority: Authority, node: Recording) -> Iterator[str]:
    with node_server(node, authority.issue("secondary2"), previous=PREVIOUS) as address:
        yield address


@pytest.fixture
def calls(node: Recording) -> Recording:
    """The node, with nothing recorded."""
    node.entered, node.read = [], 0
    return node


@pytest.mark.parametrize("caller", NODES)
@pytest.mark.parametrize("method", METHODS)
def test_only_the_node_that_may_call_a_method_reaches_it(
    method: str, caller: str, address: str, authority: Authority, calls: Recording, caplog: pytest.LogCaptureFixture
) -> None:
    allowed = PREVIOUS if method == "Batches" else "starter"
    if caller == allowed:
        assert len(call_node(address, "secondary2", authority.issue(caller), method)) == 1
        assert calls.entered == [method]
        return
    with pytest.raises(grpc.aio.AioRpcError) as error:
        call_node(address, "secondary2", authority.issue(caller), method)
    assert error.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert error.value.details() == f"node {caller} may not call {method}"
    assert (calls.entered, calls.read) == ([], 0)
    record = caplog.records[0]
    assert record.levelno == logging.WARNING
    assert f"refused node {caller} at ipv4:127.0.0.1" in record.getMessage()
    assert f"only {allowed} may call {method}" in record.getMessage()


@pytest.mark.parametrize("method", METHODS)
def test_a_certificate_that_names_no_node_opens_nothing(
    method: str, address: str, authority: Authority, calls: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certificates, "host_name", lambda node: "starter.elsewhere")
    with pytest.raises(grpc.aio.AioRpcError) as error:
        call_node(address, "secondary2", authority.issue("starter"), method)
    assert error.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert calls.entered == []


@pytest.mark.parametrize("method", METHODS)
def test_a_caller_without_a_certificate_reaches_nothing(
    method: str, address: str, authority: Authority, calls: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "mdi.rpc.channel.channel_credentials", lambda identity: grpc.ssl_channel_credentials(identity.authority)
    )
    with pytest.raises(grpc.aio.AioRpcError) as error:
        call_node(address, "secondary2", authority.issue("starter"), method)
    assert error.value.code() is grpc.StatusCode.UNAVAILABLE
    assert calls.entered == []


@pytest.mark.parametrize("caller", NODES)
def test_before_a_node_is_configured_no_node_may_send_it_batches(
    caller: str, authority: Authority, calls: Recording
) -> None:
    with node_server(calls, authority.issue("secondary2")) as address, pytest.raises(grpc.aio.AioRpcError) as error:
        call_node(address, "secondary2", authority.issue(caller), "Batches")
    assert error.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert calls.entered == []


def test_without_encryption_every_method_is_open(calls: Recording) -> None:
    with node_server(calls, None) as address:
        for method in METHODS:
            call_node(address, "secondary2", None, method)
    assert calls.entered == METHODS


@pytest.mark.parametrize(
    "table", [{}, {**CALLERS, "Shutdown": Caller.STARTER}, {**CALLERS, "Encode": None} | {"Encoded": Caller.STARTER}]
)
def test_a_table_that_does_not_name_exactly_the_service_is_an_error(table: dict[str, Caller]) -> None:
    with pytest.raises(RuntimeError, match="the table of callers and the service differ in"):
        complete(table)
