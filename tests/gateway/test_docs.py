"""The examples of docs/http.md."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from testing.fakes import FakeEngine

from mdi.core.config import GatewayConfig
from tests.gateway.conftest import serving

PAGE = Path(__file__).parents[2] / "docs" / "http.md"


@pytest.mark.skipif(shutil.which("curl") is None, reason="the examples need curl")
def test_every_curl_on_the_page_is_answered(tmp_path: Path, photograph: bytes, clip: bytes) -> None:
    for name, content in (("circle.png", photograph), ("square.png", photograph), ("clip.mp4", clip)):
        (tmp_path / name).write_bytes(content)
    examples = re.findall(r"```sh\n(.*?)```", PAGE.read_text(), re.DOTALL)
    with serving(FakeEngine(), GatewayConfig(served_model_name=("bundled",))) as server:
        for example in examples:
            script = example.replace("http://127.0.0.1:8000", server.url)
            script = script.replace("curl ", "curl -sSw '\\n=> %{http_code}' ")
            done = subprocess.run(
                ["bash", "-ec", script], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
            )
            assert done.returncode == 0, done.stderr
            expected = {"400", "404"} if "curl -i" in example else {"200"}
            assert set(re.findall("=> ([0-9]+)", done.stdout)) == expected, done.stdout
    assert len(examples) > 8
