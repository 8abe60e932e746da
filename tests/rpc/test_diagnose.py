"""What is said about a node that cannot be reached: real servers on loopback, and the reasons given."""

from __future__ import annotations

import contextlib
import gc
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

import grpc
import pytest
from testing.links import fake_node, free_port, raw_server, refused
from testing.own_link import OwnLink

from mdi.cluster.link import PipelineSettings
from mdi.cluster.node_client import NodeAddress
from mdi.core.errors import LinkError
from mdi.rpc import authority as certs
from mdi.rpc import diagnose as diagnose_module
from mdi.rpc.authority import Authority
from mdi.rpc.diagnose import diagnose
from mdi.rpc.tls import Identity


def test_a_client_of_another_authority_is_refused(server: str, starter: Identity, stranger: Authority) -> None:
    intruder = replace(
        stranger.issue("starter"), authority=starter.authority
    )  # it has the right ca.pem: that is public
    assert refused(server, "finisher", intruder) is grpc.StatusCode.UNAVAILABLE
    reason = diagnose(server, "finisher", intruder)
    assert reason
    assert "refuses the certificate of starter" in reason


def test_a_client_with_an_expired_certificate_is_refused(
    server: str, authority: Authority, outdated: Callable[[Authority, str], Identity]
) -> None:
    late = outdated(authority, "starter")
    assert refused(server, "finisher", late) is grpc.StatusCode.UNAVAILABLE
    reason = diagnose(server, "finisher", late)
    assert reason
    assert "refuses the certificate of starter: do both clocks agree" in reason


def test_a_server_of_another_authority_is_refused(stranger: Authority, starter: Identity) -> None:
    with fake_node(stranger.issue("finisher")) as address:
        assert refused(address, "finisher", starter) is grpc.StatusCode.UNAVAILABLE
        reason = diagnose(address, "finisher", starter)
    assert reason
    assert "is of another authority: copy ca.pem" in reason


def test_a_server_with_an_expired_certificate_is_refused(
    authority: Authority, starter: Identity, outdated: Callable[[Authority, str], Identity]
) -> None:
    with fake_node(outdated(authority, "finisher")) as address:
        assert refused(address, "finisher", starter) is grpc.StatusCode.UNAVAILABLE
        reason = diagnose(address, "finisher", starter)
    assert reason
    assert "has expired: make a new one there (`mdi certs node finisher --force`)" in reason


def test_a_server_with_a_certificate_that_is_not_valid_yet_is_refused(
    authority: Authority, starter: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certs, "CLOCK_SLACK", timedelta(hours=-1))
    with fake_node(authority.issue("finisher")) as address:
        assert refused(address, "finisher", starter) is grpc.StatusCode.UNAVAILABLE
        reason = diagnose(address, "finisher", starter)
    assert reason
    assert "not valid yet: do both clocks agree?" in reason


def test_another_nodes_certificate_is_refused_although_its_address_is_right(
    authority: Authority, starter: Identity
) -> None:
    with fake_node(authority.issue("secondary0", ["127.0.0.1", "localhost"])) as address:
        assert refused(address, "finisher", starter) is grpc.StatusCode.UNAVAILABLE
        reason = diagnose(address, "finisher", starter)
    assert reason == f"{address} has the certificate of secondary0, not of finisher"


def test_plain_traffic_to_an_encrypted_port_is_told(server: str) -> None:
    assert refused(server, "finisher", None) is grpc.StatusCode.UNAVAILABLE
    reason = diagnose(server, "finisher", None)
    assert reason == f"{server} is encrypted and this side is not: set ENABLE_ENCRYPTION=1 here as well"


def test_encrypted_traffic_to_a_plain_port_is_told(starter: Identity) -> None:
    with fake_node(None) as address:
        assert refused(address, "finisher", starter) is grpc.StatusCode.UNAVAILABLE
        reason = diagnose(address, "finisher", starter)
    assert reason == f"{address} is not encrypted and this side is: start the node there with ENABLE_ENCRYPTION=1"


def test_what_is_no_node_is_told(starter: Identity) -> None:
    def web(connection: socket.socket) -> None:
        connection.recv(100)
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    def hangs_up(connection: socket.socket) -> None:
        pass

    for answer in (web, hangs_up):
        with raw_server(answer) as address:
            for identity in (starter, None):
                assert diagnose(address, "finisher", identity) == f"what listens at {address} is no mdi node"


def test_a_port_that_never_answers_does_not_hold_the_caller(starter: Identity) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:  # accepts nobody: as a frozen node does
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        for identity in (starter, None):
            started = time.monotonic()
            reason = diagnose(address, "finisher", identity)
            assert reason
            assert "does not answer: is the machine on, and the port open in its firewall?" in reason
            assert time.monotonic() - started < 5


def test_a_port_where_nobody_listens_and_a_host_that_is_not_known_are_told(starter: Identity) -> None:
    port = free_port()
    for identity in (starter, None):
        reason = diagnose(f"127.0.0.1:{port}", "finisher", identity)
        assert reason == f"nothing listens at 127.0.0.1:{port}: start the node there"
        reason = diagnose("nowhere.invalid:5000", "finisher", identity)
        assert reason == "the host of nowhere.invalid:5000 is not known here"


@pytest.mark.parametrize("encrypted", [True, False])
def test_a_link_tells_why_a_node_does_not_answer(server: str, starter: Identity, encrypted: bool) -> None:
    settings = PipelineSettings("", n_slots=1, sequence_length=8)
    words = r"secondary0 does not answer.*has the certificate of finisher" if encrypted else "set ENABLE_ENCRYPTION=1"
    with pytest.raises(LinkError, match=words):
        OwnLink([NodeAddress("secondary0", server)], settings, lambda _: None, identity=starter if encrypted else None)


def test_a_connection_that_is_reset_at_once_is_named_and_closed(
    starter: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_context = diagnose_module._context

    def slow_context(identity: Identity) -> ssl.SSLContext:
        context = make_context(identity)
        time.sleep(0.2)  # a connection that is open by now has been reset
        return context

    def reset_all(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                connection.close()

    monkeypatch.setattr(diagnose_module, "_context", slow_context)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=reset_all, args=(listener,))
        thread.start()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        reason = diagnose(address, "finisher", starter)
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
    assert reason
    assert address in reason  # what is said of it depends on when the reset arrives
    gc.collect()  # a socket that was left open is an error of this test
