"""`mdi serve`: its options become the settings of the server."""

from __future__ import annotations

import re
import socket
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import typer
from testing.fakes import FakeEngine

from mdi.cli.app import app, main
from mdi.cli.options import EngineOptions
from mdi.core.config import MEBIBYTE, GatewayConfig
from mdi.gateway import server
from mdi.gateway.app import create_app
from mdi.gateway.keys import read_keys


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[GatewayConfig]:
    """The settings of the servers that a test starts; none of them serves."""
    configs = list[GatewayConfig]()

    def serve(_engine: Any, _bound: socket.socket, config: GatewayConfig) -> None:
        configs.append(config)

    monkeypatch.setattr(server, "serve", serve)
    monkeypatch.setattr(server, "raise_open_files", lambda: 1024)
    monkeypatch.setattr(EngineOptions, "start", lambda *_, **__: nullcontext(FakeEngine()))
    return configs


def test_it_opens_the_page_in_a_browser_and_says_where_there_is_none(
    monkeypatch: pytest.MonkeyPatch, served: list[GatewayConfig], capfd: pytest.CaptureFixture[str]
) -> None:
    opened = list[str]()

    def open_first(url: str) -> bool:
        opened.append(url)
        return len(opened) == 1

    monkeypatch.setattr("webbrowser.open", open_first)
    run(monkeypatch, "--open")
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", opened[0])
    assert "no browser" not in capfd.readouterr().err
    run(monkeypatch, "--open", "--host", "::1")
    assert f"no browser could be opened here: open {opened[1]} in one" in capfd.readouterr().err
    run(monkeypatch)
    assert run(monkeypatch, "--open", "--ray", "auto", "--replicas", "2") == 2
    assert len(opened) == 2


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["mdi", "serve", "bundled", "--port", "0", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def test_options_are_the_settings_of_the_server(monkeypatch: pytest.MonkeyPatch, served: list[GatewayConfig]) -> None:
    options = "--allow-host a --allow-host b --allow-origin https://c.example --max-body-mb 1 --max-upload-mb 2"
    keys = "--api-key k --metrics-key m --otlp-traces-endpoint http://127.0.0.1:4318"
    assert run(monkeypatch, *options.split(), "--drain-timeout", "3", "--strict-requests", *keys.split()) == 0
    assert served == [
        GatewayConfig(
            allow_hosts=("a", "b"),
            allow_origins=("https://c.example",),
            max_body_bytes=MEBIBYTE,
            max_upload_bytes=2 * MEBIBYTE,
            drain_timeout_s=3,
            strict_requests=True,
            api_keys=("k",),
            metrics_key="m",
            otlp_traces_endpoint="http://127.0.0.1:4318",
        )
    ]


def test_without_options_the_settings_are_the_defaults(
    monkeypatch: pytest.MonkeyPatch, served: list[GatewayConfig]
) -> None:
    monkeypatch.delenv("MDI_API_KEY", raising=False)
    assert run(monkeypatch) == 0
    assert served == [GatewayConfig()]


def test_the_page_s_options_are_those_of_the_command() -> None:
    """Every option of vLLM that docs/server.md lists as working is known, and none of those it calls unknown."""
    page = (Path(__file__).parents[2] / "docs" / "server.md").read_text()
    serve = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    known = {name for item in serve.params for name in item.opts}
    table, others = page.split("| vLLM | here |")[1].split("Options of vLLM for GPUs")
    listed = {name for row in table.splitlines() for name in re.findall(r"`(--?[a-z-]+)`", row)}
    assert len(listed) > 30
    assert listed <= known
    unknown = re.findall(r"`(--[a-z-]+)` ?[,(.]", others.replace("(see `--kv-cache-gb`)", "("))
    assert "--gpu-memory-utilization" in unknown
    assert not known & set(unknown)


def test_the_page_s_files_are_read(
    monkeypatch: pytest.MonkeyPatch, served: list[GatewayConfig], tmp_path: Path
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "server.md").read_text()
    keys, options = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "keys.yaml").write_text(keys)
    assert [key.name for key in read_keys(tmp_path / "keys.yaml")] == ["alice", "bob"]
    (tmp_path / "serve.yaml").write_text(options.replace("model: bundled\n", ""))
    assert run(monkeypatch, "--config", str(tmp_path / "serve.yaml")) == 0
    assert served[0].served_model_name == ("shapes", "gpt-4o")


def test_a_drain_may_take_any_time(monkeypatch: pytest.MonkeyPatch, served: list[GatewayConfig]) -> None:
    assert run(monkeypatch, "--drain-timeout", "inf") == 0
    server.Server(create_app(FakeEngine()), served[0])
    assert run(monkeypatch, "--drain-timeout", "nan") == 2


def test_a_wrong_setting_is_found_before_the_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, served: list[GatewayConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--allow-origin", "chat.example.com") == 2
    assert "an origin is like https://chat.example.com:8080" in " ".join(capsys.readouterr().err.split())
    assert served == []
