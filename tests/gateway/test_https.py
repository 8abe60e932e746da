"""HTTPS by the server itself."""

from __future__ import annotations

import ssl
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives import serialization
from testing.fakes import FakeEngine

from mdi.core.config import GatewayConfig
from mdi.core.errors import ConfigError
from mdi.gateway.server import check_files
from mdi.rpc.authority import create_authority, create_node
from tests.gateway.conftest import CHAT, serving


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority, a server's certificate for 127.0.0.1 and a client's, and the server's key with a password."""
    folder = tmp_path_factory.mktemp("certs")
    create_authority(folder)
    create_node(folder, "starter", ["127.0.0.1"])
    create_node(folder, "finisher")
    key = serialization.load_pem_private_key((folder / "starter.key").read_bytes(), None)
    locked = serialization.BestAvailableEncryption(b"open")
    pem, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    (folder / "locked.key").write_bytes(key.private_bytes(pem, form, locked))
    return folder


def config(certs: Path, **settings: object) -> GatewayConfig:
    given = {"ssl_certfile": certs / "starter.pem", "ssl_keyfile": certs / "starter.key"} | settings
    return GatewayConfig(**given)  # type: ignore[arg-type]


def ask(port: int, trusting: ssl.SSLContext) -> httpx.Response:
    return httpx.post(f"https://127.0.0.1:{port}/v1/chat/completions", json=CHAT, verify=trusting)


@pytest.mark.parametrize("key", [{}, {"ssl_keyfile": "locked.key", "ssl_keyfile_password": "open"}])
def test_a_server_with_a_certificate_speaks_https(certs: Path, key: dict[str, str]) -> None:
    settings = {name: certs / value if name == "ssl_keyfile" else value for name, value in key.items()}
    trusting = ssl.create_default_context(cafile=str(certs / "ca.pem"))
    with serving(FakeEngine(), config(certs, **settings)) as server:
        assert ask(server.port, trusting).status_code == 200
        with pytest.raises(httpx.ConnectError, match="certificate verify failed"):
            ask(server.port, ssl.create_default_context())


def test_with_authorities_of_clients_each_needs_a_certificate(certs: Path) -> None:
    trusting = ssl.create_default_context(cafile=str(certs / "ca.pem"))
    with serving(FakeEngine(), config(certs, ssl_ca_certs=certs / "ca.pem")) as server:
        with pytest.raises((httpx.ReadError, httpx.RemoteProtocolError)):
            ask(server.port, trusting)
        trusting.load_cert_chain(certs / "finisher.pem", certs / "finisher.key")
        assert ask(server.port, trusting).status_code == 200


@pytest.mark.parametrize(
    "settings",
    [
        {"ssl_certfile": "none.pem"},
        {"ssl_keyfile": "none.key"},
        {"ssl_keyfile": "finisher.key"},
        {"ssl_keyfile": "locked.key"},
        {"ssl_keyfile": "ca.pem"},
        {"ssl_ca_certs": "none.pem"},
    ],
)
def test_files_that_make_no_https_are_named(certs: Path, settings: dict[str, str]) -> None:
    paths = {name: certs / file for name, file in settings.items()}
    with pytest.raises(ConfigError, match=f"no HTTPS with .*{next(iter(settings.values()))}.*name PEM files"):
        check_files(config(certs, **paths))


def test_a_key_s_password_is_not_asked_for_on_the_terminal(certs: Path) -> None:
    check_files(config(certs, ssl_keyfile=certs / "locked.key", ssl_keyfile_password="open"))
    with pytest.raises(ConfigError):
        check_files(config(certs, ssl_keyfile=certs / "locked.key", ssl_keyfile_password="wrong"))
