"""Web pages of other sites: refused by a server without a key, unless an option allows them."""

from __future__ import annotations

import asyncio
from functools import cache
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from testing.fakes import FakeEngine

from mdi.core.config import GatewayConfig
from mdi.core.errors import ConfigError
from mdi.gateway.app import create_app

PAGE = "https://chat.example.com"
HERE = "127.0.0.1:8000"
STAINLESS = "authorization,content-type,x-stainless-arch,x-stainless-lang,x-stainless-retry-count"


@cache
def _app(config: GatewayConfig) -> FastAPI:
    return create_app(FakeEngine(), config)


class Client:
    """Sends requests to an app without a network."""

    def __init__(self, **settings: Any) -> None:
        self._app = _app(GatewayConfig(**settings))

    def send(self, method: str, path: str, **request: Any) -> httpx.Response:
        async def sent() -> httpx.Response:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(self._app), base_url=f"http://{HERE}") as client:
                return await client.request(method, path, **request)

        return asyncio.run(sent())

    def ask(self, **headers: str) -> httpx.Response:
        return self.send("POST", "/generate", json={"prompt": "x"}, headers=headers)


@pytest.mark.parametrize("host", ["localhost", "localhost:8000", "127.0.0.1", "[::1]:8000", "LOCALHOST.", "127.0.0.2"])
def test_a_server_on_loopback_answers_to_its_own_names(host: str) -> None:
    """B9."""
    assert Client().ask(Host=host).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "8.8.8.8", "[", "", "127.0.0.1.evil.example"]
)
def test_a_server_on_loopback_refuses_other_names(host: str) -> None:
    """B9: an attacker's name can be made to lead to 127.0.0.1."""
    for answer in (Client().ask(Host=host), Client().send("GET", "/v1/models", headers={"Host": host})):
        assert answer.status_code == 403
        assert "--allow-host" in answer.text


def test_further_names_are_an_option() -> None:
    """B9."""
    assert Client(allow_hosts=("mdi.example.com",)).ask(Host="MDI.example.com:80").status_code == 200
    assert Client(host="gpu7").ask(Host="gpu7:8000").status_code == 200


def test_a_server_for_other_machines_answers_to_addresses_but_not_to_any_name() -> None:
    """B9: an address is no name that somebody else could have made to lead here."""
    server = Client(host="0.0.0.0")
    assert server.ask(Host="192.168.1.7:8000").status_code == 200
    assert server.ask(Host="evil.example:8000").status_code == 403


def test_a_server_with_a_key_answers_to_any_name_and_page_that_has_the_key() -> None:
    """B9: pages of other sites do not have it."""
    server = Client(api_keys=("k",))
    assert server.ask(Host="evil.example").status_code == 401
    assert server.ask(Host="evil.example", Origin=PAGE, Authorization="Bearer k").status_code == 200


@pytest.mark.parametrize("kind", ["text/plain", "text/plain;charset=UTF-8", "application/x-www-form-urlencoded", None])
@pytest.mark.parametrize("path", ["/generate", "/generate/multimodal", "/v1/chat/completions", "/v1/completions"])
def test_json_is_sent_as_json(path: str, kind: str | None) -> None:
    """B9: browsers send these types for any page without asking."""
    headers = {"Content-Type": kind} if kind else {}
    answer = Client().send("POST", path, content=b'{"prompt": "x"}', headers=headers)
    assert answer.status_code == 415
    assert "application/json" in answer.text


def test_a_form_is_no_request_of_a_json_route() -> None:
    """B9."""
    assert Client().send("POST", "/generate", files={"prompt": b"x"}).status_code == 415


@pytest.mark.parametrize("origin", [PAGE, "null", "http://localhost:3000", f"http://{HERE}.evil.example"])
def test_a_foreign_page_changes_nothing(origin: str) -> None:
    """B9: whatever type it sends."""
    answer = Client().ask(Origin=origin)
    assert answer.status_code == 403
    assert f"--allow-origin {origin}" in answer.text


def test_a_page_of_this_server_is_not_foreign() -> None:
    """B9: such as /docs."""
    assert Client().ask(Origin=f"http://{HERE}").status_code == 200


@pytest.mark.parametrize("origins", [(PAGE,), ("*",)])
@pytest.mark.parametrize("key", [None, "k"])
def test_pages_of_an_allowed_site_may_ask(origins: tuple[str, ...], key: str | None) -> None:
    """C19: the browser's question is answered without a key, with all headers of the openai client."""
    server = Client(allow_origins=origins, api_keys=(key,) if key else ())
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": STAINLESS}
    answer = server.send("OPTIONS", "/v1/chat/completions", headers={"Origin": PAGE, **asked})
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == PAGE
    assert set(STAINLESS.split(",")) <= {*answer.headers["access-control-allow-headers"].lower().split(",")}
    said = server.ask(Origin=PAGE, Authorization=f"Bearer {key}")
    assert said.status_code == 200
    assert said.headers["access-control-allow-origin"] in (PAGE, "*")


def test_an_allowed_page_can_read_why_it_is_refused() -> None:
    """C19: errors have the headers, too."""
    server = Client(allow_origins=(PAGE,), api_keys=("k",), max_body_bytes=5)
    for answer in (server.ask(Origin=PAGE), server.ask(Origin=PAGE, Authorization="Bearer k")):
        assert answer.status_code in (401, 413)
        assert answer.headers["access-control-allow-origin"] == PAGE


def test_pages_of_other_sites_are_not_allowed_with_it() -> None:
    """C19."""
    server = Client(allow_origins=(PAGE,))
    asked = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    assert server.send("OPTIONS", "/v1/chat/completions", headers=asked).status_code == 400
    assert server.ask(Origin="https://evil.example").status_code == 403


@pytest.mark.parametrize("origin", ["chat.example.com", f"{PAGE}/", "https://a b", ""])
def test_what_is_no_origin_is_refused_at_the_start(origin: str) -> None:
    """C19."""
    with pytest.raises(ConfigError, match=r"an origin is like https://chat\.example\.com"):
        GatewayConfig(allow_origins=(origin,))


@pytest.mark.parametrize("path", ["/health", "/health/ready", "/v1/models", "/v1/models/fake", "/v1/nodes"])
def test_every_get_has_its_head(path: str) -> None:
    """C19."""
    answer = Client().send("HEAD", path)
    assert answer.status_code == 200
    assert int(answer.headers["content-length"]) > 0


def test_no_route_that_computes_has_one() -> None:
    """C19."""
    assert Client().send("HEAD", "/generate").status_code == 405
