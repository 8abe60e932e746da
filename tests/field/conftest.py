"""What the field tests share: servers of a scripted engine and of a tiny model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from testing.fakes import FakeEngine

from mdi import Engine
from mdi.core.config import GatewayConfig
from mdi.media import MediaPolicy
from tests.gateway.conftest import FakeServer, RealServer, serving


@pytest.fixture(scope="package")
def tiny(tiny_checkpoint: Path) -> Iterator[RealServer]:
    """Serves a tiny Qwen2-VL."""
    with Engine(tiny_checkpoint, sequence_length=512, max_sequences=4, media=MediaPolicy(remote=False)) as engine:  # noqa: SIM117
        with serving(engine) as server:
            yield server


@pytest.fixture(scope="package")
def lenient() -> Iterator[FakeServer]:
    """Serves a scripted engine."""
    with serving(FakeEngine()) as server:
        yield server


@pytest.fixture(scope="package")
def strict() -> Iterator[FakeServer]:
    """Serves a scripted engine with --strict-requests."""
    with serving(FakeEngine(), GatewayConfig(strict_requests=True)) as server:
        yield server
