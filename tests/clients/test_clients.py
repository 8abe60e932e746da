"""Clients that others wrote, against a server of the bundled model on two nodes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from testing.processes import ENVIRONMENT, serving

import mdi
from tests.clients.environment import NPM, ClientEnvironment, client_environment, pinned

pytestmark = pytest.mark.slow

PYTHON = Path(__file__).parent / "python"
STAR = Path(mdi.__file__).parent / "assets/samples/shape-1-1.png"
KEY, LIMITED_KEY = "sk-clients", "sk-limited"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of the server."""
    keys = tmp_path_factory.mktemp("clients") / "keys.yaml"
    keys.write_text(f"clients: {{key: {KEY}}}\nlimited: {{key: {LIMITED_KEY}, requests_per_minute: 1}}\n")
    with serving("bundled", "--n-nodes", "2", "--api-keys", keys, environment=ENVIRONMENT) as (_, url):
        yield url


@pytest.fixture(scope="module")
def clients() -> ClientEnvironment:
    return client_environment()


def run(*command: str | Path, server: str, cwd: Path) -> None:
    """Runs a client's checks, which read the server's URL and keys from the environment."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    variables |= {"MDI_URL": server, "MDI_KEY": KEY, "MDI_LIMITED_KEY": LIMITED_KEY, "MDI_STAR": str(STAR)}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=180, env=variables, cwd=cwd)
    assert ended.returncode == 0, ended.stdout[-20_000:] + ended.stderr[-5_000:]


@pytest.mark.timeout(350)  # it makes the environment
def test_the_environment_has_what_is_pinned(clients: ClientEnvironment) -> None:
    listed = (sys.executable, "-m", "pip", "--python", clients.python, "freeze")
    installed = subprocess.run(listed, check=True, capture_output=True, text=True, timeout=60).stdout.split()
    assert {re.sub(r"\[.*]", "", pin) for pin in pinned()} <= set(installed)


@pytest.mark.timeout(200)
@pytest.mark.parametrize("checks", sorted(file.stem for file in PYTHON.glob("with_*.py")))
def test_python(checks: str, clients: ClientEnvironment, server: str) -> None:
    options = ("-c", "pytest.ini", "--rootdir", ".", "--confcutdir", ".")
    run(clients.python, "-m", "pytest", *options, f"{checks}.py", server=server, cwd=PYTHON)


@pytest.mark.timeout(200)
@pytest.mark.parametrize("checks", sorted(file.name for file in NPM.glob("*.test.js")))
def test_npm(checks: str, clients: ClientEnvironment, server: str) -> None:
    shutil.copy(NPM / checks, clients.npm)  # beside node_modules
    run(clients.node, "--test", checks, server=server, cwd=clients.npm)
