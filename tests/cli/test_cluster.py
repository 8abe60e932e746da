"""`mdi cluster`: the machines of a server once, as JSON, and live in a terminal."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from testing.fakes import FakeEngine
from testing.links import free_port
from testing.processes import command
from testing.terminal import terminal

from mdi.cli import app as cli
from mdi.core.config import GatewayConfig
from mdi.core.status import RecoveryStatus
from tests.gateway.conftest import REAL_KEY, Server, serving

Run = Callable[..., int | None]


@pytest.fixture(scope="module")
def server() -> Iterator[Server[FakeEngine]]:
    with serving(FakeEngine(), GatewayConfig(api_keys=(REAL_KEY,))) as server:
        yield server


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command here; its exit code."""

    def run(*arguments: str) -> int | None:
        monkeypatch.setattr(sys, "argv", ["mdi", "cluster", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        code = ended.value.code
        assert code is None or isinstance(code, int)
        return code

    return run


def test_without_a_terminal_it_shows_the_machines_once(
    server: Server[FakeEngine], run: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    server.engine.recovery = RecoveryStatus(recovering=True, recoveries=2, failed_requests=1)
    assert run("--url", server.url, "--api-key", REAL_KEY) == 0
    shown = capfd.readouterr().out
    assert re.search(r"starter +ready +0-1 .* 50%", shown)
    words = " ".join(shown.split())
    assert "fake: 0 requests running, 0 waiting; KV cache 0% full; nodes lost and brought back: 2" in words
    assert "The plan: one node has the whole model." in words
    assert max(map(len, shown.splitlines())) <= 80


def test_as_json_it_says_what_the_server_says(
    server: Server[FakeEngine], run: Run, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MDI_API_KEY", f"{REAL_KEY} another")
    assert run("--url", f"{server.url}/", "--json") == 0
    said = json.loads(capfd.readouterr().out)
    assert (said["model"], said["requests"]["running"], said["nodes"][0]["name"]) == ("fake", 0, "starter")


def test_what_is_no_server_of_ours_is_told_with_the_remedy(
    server: Server[FakeEngine], run: Run, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for url, said in (
        (server.url, "needs an API key: --api-key KEY, or MDI_API_KEY"),
        (f"http://127.0.0.1:{free_port()}", "does mdi serve run there?"),
        ("127.0.0.1:8000", "--url is like http://127.0.0.1:8000, got '127.0.0.1:8000'"),
        ("http://[::", "--url is like http://127.0.0.1:8000"),
        ("http://", "--url is like http://127.0.0.1:8000"),
        (f"{server.url}/nowhere", "is no server of mdi serve"),
    ):
        key = () if "API key" in said else ("--api-key", REAL_KEY)
        assert run("--url", url, *key) == 2
        assert said in capfd.readouterr().err


def test_in_a_terminal_it_goes_on_until_ctrl_c_also_when_the_server_goes(tmp_path: Path) -> None:
    with serving(FakeEngine()) as server, terminal(command("cluster", "--url", server.url), tmp_path) as shown:
        assert "starter" in shown.read_until("MB/s")
        server.http.should_exit = True
        shown.read_until("does mdi serve run there?")
        shown.type("\x03")
        assert shown.process.wait(20) == 0
