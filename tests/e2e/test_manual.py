"""Nodes started by hand: real processes in any order, with certificates made by `mdi certs`."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
from testing.commands import ENVIRONMENT
from testing.links import Recorder, free_port
from testing.server import serving

from mdi.checkpoint.prepare import prepare
from mdi.checkpoint.source import open_source
from mdi.cli import app as cli
from mdi.rpc.diagnose import why_unreachable

ENCRYPTED = {**ENVIRONMENT, "ENABLE_ENCRYPTION": "1"}
QUESTION = ("Who are you?", "--max-tokens", "8", "--temperature", "1", "--seed", "4")
CHUNKS = ("model_secondary0.safetensors", "model_finisher.safetensors")
pytestmark = pytest.mark.usefixtures("no_process_left")


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "mdi", *map(str, arguments)]


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With chunks for three nodes."""
    path = tmp_path_factory.mktemp("manual_nodes") / "tiny"
    shutil.copytree(tiny_checkpoint, path, ignore=shutil.ignore_patterns("chunks"))
    prepare(open_source(path), 3)
    return path


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What each machine has of what `mdi certs` made in one place."""
    root = tmp_path_factory.mktemp("certs")
    made = root / "made"
    subprocess.run(command("certs", "init", "--folder", made), check=True, env=ENVIRONMENT)
    copies = {}
    for name in ("starter", "secondary0", "finisher"):
        subprocess.run(
            command("certs", "node", name, "--addr", "127.0.0.1", "--folder", made), check=True, env=ENVIRONMENT
        )
        copies[name] = root / name
        copies[name].mkdir()
        for file in ("ca.pem", f"{name}.pem", f"{name}.key"):
            shutil.copy(made / file, copies[name])
    return copies


@pytest.fixture
def nodes_config(tmp_path: Path) -> Path:
    return write_config(tmp_path / "nodes.json", free_port(), free_port())


def write_config(path: Path, *ports: int) -> Path:
    nodes = [{"addr": "127.0.0.1", "communication": {"port": port}} for port in ports]
    starter = {"addr": "127.0.0.1", "communication": {"port": 1}}
    path.write_text(json.dumps({"nodes": {"starter": starter, "secondary": nodes}}))
    return path


def ports(nodes_config: Path) -> list[int]:
    nodes = json.loads(nodes_config.read_text())["nodes"]["secondary"]
    return [node["communication"]["port"] for node in nodes]


@contextmanager
def node(
    checkpoint: Path, nodes_config: Path, index: int, certs: dict[str, Path] | None, *options: str
) -> Iterator[subprocess.Popen[str]]:
    """A node started by hand; its standard error is what a person would read."""
    chunk = checkpoint / "chunks" / "3nodes" / CHUNKS[index]
    words = command("secondary", "--nodes-config", nodes_config, str(index), "--chunk", chunk, *options)
    if certs:
        words += ["--certs", str(certs[("secondary0", "finisher")[index]])]
    environment = ENCRYPTED if certs else ENVIRONMENT
    with subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            yield process
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def alone(checkpoint: Path) -> str:
    """What one process answers."""
    done = subprocess.run(command("ask", checkpoint, *QUESTION), capture_output=True, env=ENVIRONMENT, check=True)
    return done.stdout.decode(errors="replace")


def read_until(process: subprocess.Popen[str], words: str) -> str:
    """A process's standard error up to these words."""
    assert process.stderr
    text = ""
    while words not in text:
        line = process.stderr.readline()
        assert line, text
        text += line
    return text


def asked(checkpoint: Path, nodes_config: Path, certs: Path | None) -> subprocess.Popen[str]:
    words = command("ask", checkpoint, *QUESTION, "--nodes-config", nodes_config, "--wait-s", "120")
    environment = ENCRYPTED if certs else ENVIRONMENT
    words += ["--certs", str(certs)] if certs else []
    return subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, errors="replace"
    )


def test_encrypted_nodes_in_any_order_answer_as_one_process_does(
    checkpoint: Path, nodes_config: Path, certs: dict[str, Path], alone: str
) -> None:
    with node(checkpoint, nodes_config, 1, certs) as finisher:
        assert f"finisher listens at 127.0.0.1:{ports(nodes_config)[1]}, encrypted" in read_until(finisher, "listens")
        with asked(checkpoint, nodes_config, certs["starter"]) as starter:
            read_until(starter, "node secondary0 is awaited: nothing listens at")
            with node(checkpoint, nodes_config, 0, certs):
                answer, rest = starter.communicate(timeout=120)
    assert starter.returncode == 0, rest
    assert answer == alone
    assert finisher.wait(20) == 0


def test_the_same_in_the_clear_and_the_other_way_round(checkpoint: Path, nodes_config: Path, alone: str) -> None:
    with asked(checkpoint, nodes_config, None) as starter:
        read_until(starter, "node finisher is awaited")
        with node(checkpoint, nodes_config, 0, None) as secondary, node(checkpoint, nodes_config, 1, None):
            assert "not encrypted" in read_until(secondary, "listens")
            answer, rest = starter.communicate(timeout=120)
    assert starter.returncode == 0, rest
    assert answer == alone


def test_a_node_started_anew_by_hand_joins_a_running_server(
    checkpoint: Path, nodes_config: Path, certs: dict[str, Path]
) -> None:
    question = {"prompt": "x", "max_tokens": 40, "temperature": 1, "seed": 3}
    options = ("--nodes-config", str(nodes_config), "--certs", str(certs["starter"]), "--wait-s", "120")
    with (
        node(checkpoint, nodes_config, 0, certs),
        node(checkpoint, nodes_config, 1, certs) as finisher,
        serving(str(checkpoint), *options, environment=ENCRYPTED) as (process, url),
    ):
        before = httpx.post(f"{url}/generate", json=question, timeout=120).json()
        finisher.kill()
        finisher.wait()
        with node(checkpoint, nodes_config, 1, certs):
            assert httpx.post(f"{url}/generate", json=question, timeout=120).json() == before
            shown = httpx.get(f"{url}/v1/nodes").json()
            assert [one["restarts"] for one in shown["nodes"]] == [0, 0, 1]
            process.send_signal(signal.SIGTERM)
            process.wait(30)


def test_the_link_between_two_nodes_says_why_it_broke(
    checkpoint: Path, nodes_config: Path, certs: dict[str, Path], tmp_path: Path
) -> None:
    """The starter reaches both nodes, but secondary0 is shown another one where the finisher should be."""
    secondary_port, finisher_port = ports(nodes_config)
    with (
        node(checkpoint, nodes_config, 0, certs) as secondary,
        node(checkpoint, nodes_config, 1, certs) as finisher,
    ):
        read_until(secondary, "listens")
        read_until(finisher, "listens")
        gone = Recorder(f"127.0.0.1:{finisher_port}")
        split = write_config(tmp_path / "split.json", secondary_port, int(gone.address.split(":")[1]))
        options = ("--nodes-config", str(split), "--certs", str(certs["starter"]))
        with serving(str(checkpoint), *options, environment=ENCRYPTED) as (_process, url):
            assert httpx.get(f"{url}/health/ready", timeout=30).status_code == 200
            gone.close()
            broke = read_until(secondary, "broke")
            assert f"the link to node finisher at {gone.address} broke: nothing listens at {gone.address}" in broke


@pytest.mark.parametrize("encrypted", ["node", "starter"])
def test_one_side_encrypted_alone_is_told(
    checkpoint: Path,
    nodes_config: Path,
    certs: dict[str, Path],
    encrypted: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with node(checkpoint, nodes_config, 0, certs if encrypted == "node" else None) as process:
        read_until(process, "listens")
        words = command("ask", checkpoint, *QUESTION, "--nodes-config", nodes_config, "--wait-s", "1")[2:]
        if encrypted == "starter":
            monkeypatch.setenv("ENABLE_ENCRYPTION", "1")
            words += ["--certs", str(certs["starter"])]
        assert exit_code(words, monkeypatch) == 1
    said = capfd.readouterr().err
    assert "not all nodes were there within 1 s" in said
    place = f"127.0.0.1:{ports(nodes_config)[0]}"
    if encrypted == "node":
        assert f"{place} is encrypted and this side is not: set ENABLE_ENCRYPTION=1 here as well" in said
    else:
        assert f"{place} is not encrypted and this side is: start the node there with ENABLE_ENCRYPTION=1" in said


def test_a_refused_peer_is_logged_where_it_was_refused(
    checkpoint: Path, nodes_config: Path, certs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strangers = tmp_path / "strangers"
    monkeypatch.setenv("ENABLE_ENCRYPTION", "1")
    for made in (["init"], ["node", "starter"]):
        assert exit_code(["mdi", "certs", *made, "--folder", str(strangers)], monkeypatch) == 0
    with node(checkpoint, nodes_config, 0, certs) as process:
        read_until(process, "listens")
        words = command("ask", checkpoint, *QUESTION, "--nodes-config", nodes_config, "--wait-s", "1")[2:]
        assert exit_code([*words, "--certs", str(strangers)], monkeypatch) == 1
        read_until(process, "Handshake failed")


def exit_code(words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Of a command run in this process: starting one takes seconds."""
    monkeypatch.setattr(sys, "argv", ["mdi", *words[1:]])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_local_nodes_are_encrypted_too_and_leave_no_certificate_behind(checkpoint: Path, tmp_path: Path) -> None:
    environment = {**ENCRYPTED, "TMPDIR": str(tmp_path)}
    with serving(str(checkpoint), "--n-nodes", "3", environment=environment) as (process, url):
        assert httpx.get(f"{url}/health/ready", timeout=30).status_code == 200
        assert list(tmp_path.glob("mdi-certs-*")) == []
        for child in psutil.Process(process.pid).children(recursive=True):
            [listening] = [one for one in child.net_connections("tcp") if one.status == psutil.CONN_LISTEN]
            reason = why_unreachable(f"127.0.0.1:{listening.laddr.port}", "any", None)
            assert reason
            assert "is encrypted and this side is not" in reason
        [first, *_] = psutil.Process(process.pid).children(recursive=True)
        first.kill()
        answer = httpx.post(f"{url}/generate", json={"prompt": "x", "max_tokens": 4}, timeout=120)
        assert answer.status_code == 200
        assert list(tmp_path.glob("mdi-certs-*")) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("secondary",), "give this node its chunk"),
        (("secondary", "0"), "--nodes-config FILE 0"),
        (("secondary", "--nodes-config", "CONFIG"), "--nodes-config FILE 0"),
        (("secondary", "0", "--nodes-config", "CONFIG", "--spare", "0"), "FILE 0 (or --spare 0, or --vision)"),
        (("secondary", "--nodes-config", "CONFIG", "--spare", "0"), "no spare 0 in nodes.spare: it has none"),
        (
            ("secondary", "--nodes-config", "CONFIG", "0", "--cache-folder", "CONFIG"),
            "another folder with --cache-folder",
        ),
        (("serve", "CHECKPOINT", "--nodes-config", "CONFIG", "--spare-after", "-1"), "takes over after 0 s or more"),
        (("secondary", "--nodes-config", "CONFIG", "2", "--chunk", "FINISHER"), "no node 2 after the starter"),
        (("secondary", "--nodes-config", "CONFIG", "0", "--chunk", "FINISHER"), "is the chunk of finisher"),
        (("secondary", "--nodes-config", "/no/such.json", "0", "--chunk", "FINISHER"), "cannot be read"),
        (("ask", "CHECKPOINT", "x", "--nodes-config", "/no/such.json"), "cannot be read"),
        (("ask", "CHECKPOINT", "x", "--nodes-config", "CONFIG", "--n-nodes", "3"), "leave both out"),
        (("ask", "CHECKPOINT", "x", "--nodes-config", "CONFIG", "--layers", "2,2,2"), "leave both out"),
        (("ask", "CHECKPOINT", "x", "--nodes-config", "CONFIG", "--wait-s", "0"), "longer than 0 s"),
        (("secondary", "--nodes-config", "CONFIG", "--vision"), "has no node nodes.vision"),
        (("serve", "CHECKPOINT", "--nodes-config", "ELSEWHERE"), "is on another machine"),
        (("serve", "CHECKPOINT", "--nodes-config", "LAYERS"), "add up to 1 + 1 + 1 = 3, but the model has 6"),
        (("certs", "node", "finisher", "--folder", "/no/such"), "run `mdi certs init` first"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_commands_end_with_exit_code_2_and_the_cause(
    words: tuple[str, ...],
    message: str,
    checkpoint: Path,
    nodes_config: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("ELSEWHERE", "LAYERS"):
        changed = json.loads(nodes_config.read_text())
        if name == "ELSEWHERE":
            changed["nodes"]["secondary"][0]["addr"] = "10.11.12.13"
        else:
            for one in (changed["nodes"]["starter"], *changed["nodes"]["secondary"]):
                one["layers"] = 1
        (tmp_path / name).write_text(json.dumps(changed))
    places = {
        "CHECKPOINT": checkpoint,
        "CONFIG": nodes_config,
        "FINISHER": checkpoint / "chunks" / "3nodes" / "model_finisher.safetensors",
        **{name: tmp_path / name for name in ("ELSEWHERE", "LAYERS")},
    }
    assert exit_code(["mdi", *(str(places.get(word, word)) for word in words)], monkeypatch) == 2
    assert message in capfd.readouterr().err


def test_a_missing_certificate_is_named_before_anything_is_loaded(
    checkpoint: Path, nodes_config: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENABLE_ENCRYPTION", "1")
    chunk = checkpoint / "chunks" / "3nodes" / CHUNKS[0]
    assert exit_code(["mdi", "secondary", "--chunk", str(chunk), "--certs", "/no/such"], monkeypatch) == 2
    assert "run `mdi certs node secondary0`" in capfd.readouterr().err
    words = ["mdi", "ask", str(checkpoint), "x", "--nodes-config", str(nodes_config), "--certs", "/no/such"]
    assert exit_code(words, monkeypatch) == 2
    assert "run `mdi certs node starter`" in capfd.readouterr().err
    monkeypatch.setenv("ENABLE_ENCRYPTION", "maybe")
    assert exit_code(words, monkeypatch) == 2
    assert "ENABLE_ENCRYPTION must be 1 or 0" in capfd.readouterr().err
