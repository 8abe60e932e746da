"""`mdi serve --config FILE`, and words after an option that may be repeated."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from testing.fakes import FakeEngine

from mdi.cli.app import main
from mdi.cli.options import EngineOptions
from mdi.core.config import MEBIBYTE, GatewayConfig
from mdi.gateway import server


class Started:
    """What the commands of a test start."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.model = ""
        self.engine: dict[str, Any] = {}
        self.options: EngineOptions | None = None
        self.gateway = GatewayConfig()
        self._patch = monkeypatch
        monkeypatch.setattr(server, "serve", self._serve)
        monkeypatch.setattr(server, "raise_open_files", lambda: 1024)
        monkeypatch.setattr(EngineOptions, "start", lambda *given, **settings: self._start(*given, **settings))

    def _start(self, options: EngineOptions, model: str, **settings: Any) -> Any:
        self.options, self.model, self.engine = options, model, settings
        return nullcontext(FakeEngine())

    def _serve(self, _engine: Any, _bound: Any, config: GatewayConfig) -> None:
        self.gateway = config

    def by(self, *arguments: str | Path) -> int | str | None:
        """The exit code of `mdi serve` with these arguments, and a free port unless they name one."""
        self._patch.setattr(sys, "argv", ["mdi", "serve", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    return Started(monkeypatch)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "serve.yaml"


def test_a_file_holds_options_under_any_of_their_long_names(started: Started, file: Path) -> None:
    file.write_text(
        """
        model: bundled
        port: 0
        served-model-name: [small, "7"]
        allowed-origins: https://a.example
        max_model_len: 4k
        max-num-seqs: 3
        pipeline-parallel-size: 2
        limit-mm-per-prompt: {image: 2}
        dtype: auto
        kv-cache-dtype: auto
        strict-requests: true
        max-body-mb: 5
        root-path: /mdi
        hf-token:
        """
    )
    assert started.by("--config", file) == 0
    assert started.model == "bundled"
    assert started.options is not None
    assert started.options.config("bundled").cluster.n_nodes == 2
    assert started.options.dtype is None
    expected = {
        "sequence_length": 4000,
        "max_sequences": 3,
        "max_images": 2,
        "max_videos": None,
        "kv_cache_dtype": None,
    }
    assert started.engine.items() >= expected.items()
    assert started.gateway == GatewayConfig(
        served_model_name=("small", "7"),
        allow_origins=("https://a.example",),
        strict_requests=True,
        max_body_bytes=5 * MEBIBYTE,
        root_path="/mdi",
    )


def test_what_is_typed_overrides_the_file(started: Started, file: Path) -> None:
    file.write_text("model: bundled\nport: 0\nmax-num-seqs: 3\nserved-model-name: [a, b]\n")
    assert started.by("tiny", "--config", file, "--max-sequences", "4", "--served-model-name", "c") == 0
    assert started.model == "tiny"
    assert started.engine["max_sequences"] == 4
    assert started.gateway.served_model_name == ("c",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("max-model-length: 4", "unknown option max-model-length: did you mean max-model-len?"),
        ("config: other.yaml", "unknown option config"),
        ("gpu: {memory: 1}", "unknown option gpu: its keys are the long names of options"),
        ("port: 8000\n  host: x", "line 2 is not valid YAML"),
        ("port: 2027-13-45", "is not valid YAML"),
        ("- port", "holds no options"),
        ("just words", "holds no options"),
        ("max-model-len: 4x", "a number of tokens is like 4096"),
        ("port: high", "Invalid value for '--port'"),
        ("!!python/object/apply:os.system ['true']", "is not valid YAML"),
    ],
)
def test_a_bad_file_is_refused_by_name(
    started: Started, file: Path, capsys: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    file.write_text(content)
    assert started.by("bundled", "--config", file) == 2
    shown = " ".join(capsys.readouterr().err.replace("│", "").split())
    assert message in shown


def test_a_file_that_cannot_be_read_is_named(started: Started, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert started.by("bundled", "--config", file) == 2
    assert "cannot be read (No such file or directory)" in " ".join(capsys.readouterr().err.split())


def test_words_after_a_repeated_option_belong_to_it(started: Started) -> None:
    """As `vllm serve` reads them."""
    assert started.by("bundled", "--served-model-name", "a", "b", "--port", "0", "--allowed_hosts", "x", "y") == 0
    assert started.gateway == GatewayConfig(served_model_name=("a", "b"), allow_hosts=("x", "y"))
    assert started.by("--allow-host", "x", "bundled", "--port", "0") == 0
    assert started.model == "bundled"
    assert started.gateway == GatewayConfig(allow_hosts=("x",))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--limit-mm-per-prompt", "audio=1"], "--limit-mm-per-prompt is like image=2,video=1"),
        (["--ssl-keyfile", "key.pem"], "--ssl-keyfile needs a certificate: give it with --ssl-certfile"),
        (["--ssl-certfile", "none.pem"], "no HTTPS with none.pem"),
        (["--api-keys", "none.yaml"], "the API keys in none.yaml cannot be read (No such file or directory)"),
        (["--api-key", ""], "the API key is empty"),
        (["--root-path", "mdi/"], "a root path begins with /"),
        (["--served-model-name", ""], "a name of the model is empty"),
        (["--uvicorn-log-level", "loud"], "uvicorn_log_level must be one of critical, error"),
        (["--ckpt", "other"], "name one checkpoint"),
    ],
)
def test_options_that_cannot_be_are_refused_before_the_model_is_loaded(
    started: Started, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert started.by("bundled", "--port", "0", *arguments) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert started.model == ""
