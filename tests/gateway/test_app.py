"""The application and its address."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mdi.core.errors import (
    ConfigError,
)
from mdi.gateway.app import GatewayConfig, bind
from tests.gateway.conftest import (
    RealServer,
)


def test_a_port_in_use_is_named(real: RealServer) -> None:
    port = int(real.url.rsplit(":", 1)[1])
    with pytest.raises(ConfigError, match=f"{port}.*--port"):
        bind("127.0.0.1", port)


def test_an_empty_key_is_refused_at_the_start() -> None:
    with pytest.raises(ConfigError, match="empty"):
        GatewayConfig(api_key="")


def test_the_gateway_loads_no_tensor_library() -> None:
    script = "import sys, mdi.gateway.app; sys.exit(bool({'torch', 'numpy', 'transformers'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", script], timeout=60, check=False).returncode == 0
