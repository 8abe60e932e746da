"""The page's files over HTTP: open without a key, whole, and bound by a strict policy."""

from __future__ import annotations

import re

import httpx
import pytest

from mdi.core.config import GatewayConfig
from mdi.gateway.page import FOLDER
from mdi.gateway.server import bind, page_url
from tests.gateway.conftest import FakeServer

FILES = sorted(str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*") if path.is_file())
IMPORTED = re.compile(r'^import .*? from "(.+?)";$', re.MULTILINE)


def test_the_page_needs_no_key_and_may_do_little(server: FakeServer) -> None:
    page = httpx.get(f"{server.url}/")
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    policy = dict(each.strip().split(" ", 1) for each in page.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert re.fullmatch("'self' 'sha256-[A-Za-z0-9+/=]{44}'", policy["script-src"])
    assert policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'"
    assert page.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("name", FILES)
def test_every_file_is_served_and_kept_by_no_browser(server: FakeServer, name: str) -> None:
    answer = httpx.get(f"{server.url}/page/{name}")
    assert answer.content == (FOLDER / name).read_bytes()
    assert answer.headers["cache-control"] == "no-cache"
    again = httpx.get(f"{server.url}/page/{name}", headers={"If-None-Match": answer.headers["etag"]})
    assert again.status_code == 304


@pytest.mark.parametrize(
    "path", ["/page/nothing.js", "/page/../app.py", "/page/%2e%2e/calibration.txt", "/page/", "/page"]
)
def test_nothing_else_is(server: FakeServer, path: str) -> None:
    assert httpx.get(server.url + path, headers=server.headers, follow_redirects=True).status_code in (404, 405)
    if not path.startswith("/page/"):
        assert httpx.get(server.url + path).status_code == 401


def test_every_import_names_a_file() -> None:
    known = re.findall(r'"(.+?)": "\./page/(.+?)"', (FOLDER / "index.html").read_text())
    libraries = dict(known)
    assert all((FOLDER / file).is_file() for file in libraries.values())
    for script in FOLDER.glob("*.js"):
        for name in IMPORTED.findall(script.read_text()):
            assert (FOLDER / name).is_file() if name.startswith("./") else name in libraries, (script.name, name)


def test_all_scripts_are_fetched_at_once() -> None:
    """Otherwise a browser would find them one after the other, import by import."""
    first = re.findall(r'(?:modulepreload" href|module" src)="page/(.+?)"', (FOLDER / "index.html").read_text())
    assert sorted(first) == sorted(name for name in FILES if name.endswith(".js"))


def test_answers_of_the_api_may_do_nothing_in_a_browser(server: FakeServer) -> None:
    for path in ("/health", "/v1/models", "/nowhere"):
        assert server.get(path).headers["content-security-policy"].startswith("default-src 'none'; ")
        assert "script-src" not in server.get(path).headers["content-security-policy"]


@pytest.mark.parametrize(
    ("host", "config", "url"),
    [
        ("127.0.0.1", GatewayConfig(), "http://127.0.0.1:{}/"),
        ("0.0.0.0", GatewayConfig(host="0.0.0.0", api_keys=("k",)), "http://127.0.0.1:{}/"),
        ("127.0.0.2", GatewayConfig(root_path="/mdi"), "http://127.0.0.2:{}/mdi/"),
    ],
)
def test_a_browser_on_this_machine_is_sent_to_loopback(host: str, config: GatewayConfig, url: str) -> None:
    with bind(host, 0) as bound:
        assert page_url(bound, config) == url.format(bound.getsockname()[1])
