"""What the page's tests share: Chromium, and a page in front of a scripted engine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from testing.fakes import FakeEngine

from tests.gateway.conftest import FakeServer, serving


@pytest.fixture(scope="package")
def browser() -> Iterator[object]:
    from testing.browser import chromium

    with chromium() as browser:
        yield browser


@pytest.fixture(scope="package")
def shared() -> Iterator[FakeServer]:
    with serving(FakeEngine()) as server:
        yield server


@pytest.fixture
def server(shared: FakeServer) -> FakeServer:
    shared.engine.reset()
    return shared
