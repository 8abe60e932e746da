"""A server under a path of a proxy's."""

from __future__ import annotations

import asyncio
import re

import httpx
import pytest
from fastapi import FastAPI
from testing.fakes import FakeEngine

from mdi.core.config import GatewayConfig
from mdi.gateway.app import create_app
from tests.gateway.conftest import CHAT

app = create_app(FakeEngine(), GatewayConfig(root_path="/mdi", api_keys=("k",), allow_origins=("https://a.example",)))


def send(path: str, app: FastAPI = app, key: str = "k", **request: object) -> httpx.Response:
    async def sent() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            method = "POST" if "json" in request else "GET"
            return await client.request(method, path, headers={"Authorization": f"Bearer {key}"}, **request)  # type: ignore[arg-type]

    return asyncio.run(sent())


@pytest.mark.parametrize("prefix", ["", "/mdi"], ids=["the proxy takes it off", "the proxy leaves it"])
def test_requests_arrive_with_the_path_or_without(prefix: str) -> None:
    assert send(f"{prefix}/v1/chat/completions", json=CHAT).status_code == 200
    assert send(f"{prefix}/health", key="none").status_code == 200
    refused = send(f"{prefix}/v1/models", key="none")
    assert refused.status_code == 401
    assert refused.json()["error"]["type"] == "authentication_error"  # OpenAI's shape
    wrong = send(f"{prefix}/v1/chat/completions", json={})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "model")


def test_the_path_itself_leads_to_the_page() -> None:
    assert send("/mdi").headers["location"] == "/mdi/"
    for path in ("/mdi/", "/", "/mdi/page/app.js", "/page/app.js"):
        assert send(path, key="none").status_code == 200


def test_the_files_of_the_docs_are_where_their_page_says() -> None:
    files = re.findall(r'(?:src|href)="([^"]+)"', send("/mdi/docs").text)
    assert len(files) == 3
    assert {send(file).status_code for file in files} == {200}


def test_other_paths_that_begin_alike_are_not_its() -> None:
    assert send("/mdinot/v1/models").status_code == 404


def test_the_page_and_the_document_name_the_path() -> None:
    assert send("/mdi/openapi.json").json()["servers"] == [{"url": "/mdi"}]
    page = send("/mdi/docs").text
    assert "'/mdi/openapi.json'" in page
    assert '"/mdi/static-offline-docs/' in page
