"""What the checks of all clients share. They run in an environment of their own, see tests/clients/test_clients.py."""

from __future__ import annotations

import base64
import os
from pathlib import Path

import pytest

SAMPLES = Path(__file__).parents[3] / "src/mdi/assets/samples"


@pytest.fixture(scope="session")
def base_url() -> str:
    """OpenAI's base URL of a server of the bundled model."""
    return os.environ["MDI_URL"] + "/v1"


@pytest.fixture(scope="session")
def key() -> str:
    return os.environ["MDI_KEY"]


@pytest.fixture(scope="session")
def limited_key() -> str:
    """A key that may send one request a minute."""
    return os.environ["MDI_LIMITED_KEY"]


@pytest.fixture(scope="session")
def star() -> str:
    """A purple star, as base64 of a PNG."""
    return base64.b64encode((SAMPLES / "shape-1-1.png").read_bytes()).decode()


@pytest.fixture(scope="session")
def star_url(star: str) -> str:
    return f"data:image/png;base64,{star}"


@pytest.fixture(scope="session")
def ninety_eight_url() -> str:
    """A picture with the text 98 at its bottom."""
    return "data:image/png;base64," + base64.b64encode((SAMPLES / "read-1-1.png").read_bytes()).decode()
