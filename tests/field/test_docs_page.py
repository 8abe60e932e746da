"""The page that shows the routes, without a network."""

from __future__ import annotations

import re

from testing.fakes import FakeEngine

from tests.gateway.conftest import serving


def test_the_page_loads_nothing_from_other_sites() -> None:
    """C20: its scripts and styles are served from here, and the browser may fetch no others."""
    with serving(FakeEngine()) as server:
        page = server.get("/docs")
        loaded = re.findall(r'(?:src|href)="([^"]+)"', page.text)
        assert {path.rsplit(".", 1)[1] for path in loaded} == {"js", "css", "png"}
        for path in loaded:
            assert path.startswith("/")
            assert len(server.get(path).content) > 1000
        assert "http" not in re.sub(r"window\.location\S*", "", page.text)
        assert page.headers["content-security-policy"].startswith("default-src 'none'; ")
        [document] = re.findall(r"url: '([^']+)'", page.text)
        assert "/v1/chat/completions" in server.get(document).json()["paths"]
