"""The application and its address."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mdi.core.config import GatewayConfig
from mdi.core.errors import ConfigError
from mdi.gateway.server import bind
from tests.gateway.conftest import FakeServer, RealServer


def test_a_port_in_use_is_named(real: RealServer) -> None:
    port = int(real.url.rsplit(":", 1)[1])
    with pytest.raises(ConfigError, match=f"{port}.*--port"):
        bind("127.0.0.1", port)


def test_an_empty_key_is_refused_at_the_start() -> None:
    with pytest.raises(ConfigError, match="empty"):
        GatewayConfig(api_keys=("",))


def test_the_gateway_loads_no_tensor_library() -> None:
    script = "import sys, mdi.gateway.app; sys.exit(bool({'torch', 'numpy', 'transformers'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", script], timeout=60, check=False).returncode == 0


def test_the_fields_of_requests_are_described(open_server: FakeServer) -> None:
    schemas = open_server.get("/openapi.json").json()["components"]["schemas"]
    assert {"n_samples", "prompt", "top_p", "min_pixels"} < {*schemas["TextRequest"]["properties"]}
    assert {"n", "messages", "top_logprobs", "max_completion_tokens"} < {*schemas["ChatRequest"]["properties"]}
    assert "top_logprobs" not in schemas["TextRequest"]["properties"]
