"""The manual launcher: real node processes in any order, with certificates made by `mdi certs`."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from testing.links import RecordingProxy
from testing.manual_cluster import NODES, ManualCluster, on_loopback
from testing.processes import ENVIRONMENT, Process, mdi, serving

from mdi.checkpoint.prepare import prepare
from mdi.checkpoint.source import open_source
from mdi.cli import app as cli
from mdi.rpc.diagnose import diagnose

ENCRYPTED = {**ENVIRONMENT, "ENABLE_ENCRYPTION": "1"}
QUESTION = ("Who are you?", "--max-tokens", "8", "--temperature", "1", "--seed", "4")
pytestmark = pytest.mark.usefixtures("no_process_left")


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("manual") / "tiny"
    return Path(shutil.copytree(tiny_checkpoint, path, ignore=shutil.ignore_patterns("chunks")))


@pytest.fixture(scope="module")
def chunks(checkpoint: Path) -> Path:
    """The checkpoint's chunks for three nodes."""
    return prepare(open_source(checkpoint), 3)


@pytest.fixture(scope="module")
def alone(checkpoint: Path) -> str:
    """What one process answers."""
    done = mdi("ask", checkpoint, *QUESTION)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def plain(chunks: Path, tmp_path: Path) -> Iterator[ManualCluster]:
    """Two nodes with their chunks, none of them running."""
    (folder := tmp_path / "plain").mkdir()
    with ManualCluster(folder, on_loopback(*NODES), chunks=chunks) as nodes:
        yield nodes


@pytest.fixture
def encrypted(chunks: Path, tmp_path: Path) -> Iterator[ManualCluster]:
    """The same with certificates."""
    (folder := tmp_path / "encrypted").mkdir()
    with ManualCluster(folder, on_loopback(*NODES), chunks=chunks, encrypted=True) as nodes:
        yield nodes


def answer(starter: Process) -> str:
    """The output of an `ask` that ends well."""
    assert starter.popen.stdout
    text = starter.popen.stdout.read()
    assert starter.popen.wait(60) == 0, "".join(starter.lines)
    return text


def test_encrypted_nodes_in_any_order_answer_as_one_process_does(
    encrypted: ManualCluster, checkpoint: Path, alone: str
) -> None:
    finisher = encrypted.start("finisher")
    port = encrypted.places["finisher"].port
    assert f"finisher listens at 127.0.0.1:{port}, encrypted" in finisher.wait_for_line("listens")
    starter = encrypted.ask(checkpoint, *QUESTION)
    starter.wait_for_line("node secondary0 is awaited: nothing listens at")
    encrypted.start("secondary0")
    assert answer(starter) == alone
    finisher.popen.terminate()
    assert finisher.popen.wait(20) == 0


@pytest.mark.slow
def test_the_same_in_the_clear_and_the_other_way_round(plain: ManualCluster, checkpoint: Path, alone: str) -> None:
    starter = plain.ask(checkpoint, *QUESTION)
    starter.wait_for_line("node finisher is awaited")
    secondary, _ = plain.start_all().values()
    assert "not encrypted" in secondary.wait_for_line("listens")
    assert answer(starter) == alone


@pytest.mark.slow
def test_a_node_that_is_started_again_joins_a_running_server(encrypted: ManualCluster, checkpoint: Path) -> None:
    question = {"prompt": "x", "max_tokens": 40, "temperature": 1, "seed": 3}
    encrypted.start_all()
    options = (*encrypted.starter_options, "--wait-s", "100")
    with serving(checkpoint, *options, environment=ENCRYPTED) as (process, url):
        before = httpx.post(f"{url}/generate", json=question, timeout=60).json()
        encrypted.process("finisher").kill()
        encrypted.start("finisher")
        assert httpx.post(f"{url}/generate", json=question, timeout=60).json() == before
        shown = httpx.get(f"{url}/v1/nodes").json()
        assert [one["restarts"] for one in shown["nodes"]] == [0, 0, 1]
        process.send_signal(signal.SIGTERM)
        process.wait(30)


@pytest.mark.slow
def test_the_link_between_two_nodes_says_why_it_broke(
    encrypted: ManualCluster, checkpoint: Path, tmp_path: Path
) -> None:
    """The starter reaches both nodes, but the address that secondary0 gets for the finisher is a proxy's."""
    secondary, finisher = encrypted.start_all().values()
    secondary.wait_for_line("listens")
    finisher.wait_for_line("listens")
    proxy = RecordingProxy(f"127.0.0.1:{encrypted.places['finisher'].port}")
    config = json.loads(encrypted.config.read_text())
    config["nodes"]["secondary"][1] |= {"addr": "127.0.0.2", "communication": {"port": proxy.port}}
    encrypted.config.write_text(json.dumps(config))
    with serving(checkpoint, *encrypted.starter_options, environment=ENCRYPTED) as (_process, url):
        assert httpx.get(f"{url}/health/ready", timeout=30).status_code == 200
        proxy.close()
        broke = secondary.wait_for_line("broke")
        assert f"the link to node finisher at {proxy.address} broke: nothing listens at {proxy.address}" in broke


@pytest.mark.parametrize("side", ["node", "starter"])
def test_encryption_on_one_side_alone_is_reported(
    side: str,
    plain: ManualCluster,
    encrypted: ManualCluster,
    checkpoint: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nodes = encrypted if side == "node" else plain
    nodes.start("secondary0").wait_for_line("listens")
    words: list[str | Path] = ["ask", checkpoint, *QUESTION, "--nodes-config", nodes.config, "--wait-s", "1"]
    if side == "starter":
        monkeypatch.setenv("ENABLE_ENCRYPTION", "1")
        words += ["--certs", encrypted.certs("starter")]
    assert exit_code(monkeypatch, *words) == 1
    reported = capfd.readouterr().err
    assert "not all nodes were there within 1 s" in reported
    place = f"127.0.0.1:{nodes.places['secondary0'].port}"
    if side == "node":
        assert f"{place} is encrypted and this side is not: set ENABLE_ENCRYPTION=1 here as well" in reported
    else:
        assert f"{place} is not encrypted and this side is: start the node there with ENABLE_ENCRYPTION=1" in reported


def test_a_refused_peer_is_logged_where_it_was_refused(
    encrypted: ManualCluster, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strangers = tmp_path / "strangers"
    monkeypatch.setenv("ENABLE_ENCRYPTION", "1")
    for made in (["init"], ["node", "starter"]):
        assert exit_code(monkeypatch, "certs", *made, "--folder", strangers) == 0
    secondary = encrypted.start("secondary0")
    secondary.wait_for_line("listens")
    words: list[str | Path] = ["ask", checkpoint, *QUESTION, "--nodes-config", encrypted.config, "--wait-s", "1"]
    assert exit_code(monkeypatch, *words, "--certs", strangers) == 1
    secondary.wait_for_line("Handshake failed")


def exit_code(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> int:
    """Exit code of a command that runs in this process, which is faster than starting one."""
    monkeypatch.setattr(sys, "argv", ["mdi", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


@pytest.mark.slow
def test_local_nodes_are_encrypted_too_and_leave_no_certificate_behind(checkpoint: Path, tmp_path: Path) -> None:
    environment = {**ENCRYPTED, "TMPDIR": str(tmp_path)}
    with serving(checkpoint, "--n-nodes", "3", environment=environment) as (process, url):
        assert httpx.get(f"{url}/health/ready", timeout=30).status_code == 200
        assert list(tmp_path.iterdir()) == []
        for child in psutil.Process(process.pid).children(recursive=True):
            [listening] = [one for one in child.net_connections("tcp") if one.status == psutil.CONN_LISTEN]
            reason = diagnose(f"127.0.0.1:{listening.laddr.port}", "any", None)
            assert reason
            assert "is encrypted and this side is not" in reason
        [first, *_] = psutil.Process(process.pid).children(recursive=True)
        first.kill()
        answer = httpx.post(f"{url}/generate", json={"prompt": "x", "max_tokens": 4}, timeout=120)
        assert answer.status_code == 200
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("secondary",), "give this node its chunk"),
        (("secondary", "--role", "anybody"), "there is no role 'anybody'"),
        (("secondary", "0"), "--nodes-config FILE 0"),
        (("secondary", "--nodes-config", "CONFIG"), "--nodes-config FILE 0"),
        (("secondary", "0", "--nodes-config", "CONFIG", "--spare", "0"), "FILE 0 (or --spare 0, or --vision)"),
        (("secondary", "--nodes-config", "CONFIG", "--spare", "0"), "no spare 0 in nodes.spare: it has none"),
        (
            ("secondary", "--nodes-config", "CONFIG", "0", "--cache-folder", "CONFIG"),
            "another folder with --cache-folder",
        ),
        (("serve", "CHECKPOINT", "--nodes-config", "CONFIG", "--spare-after", "-1"), "--spare-after"),
        (("secondary", "--nodes-config", "CONFIG", "2", "--chunk", "FINISHER"), "no node 2 after the starter"),
        (("secondary", "--nodes-config", "CONFIG", "0", "--chunk", "FINISHER"), "is the chunk of finisher"),
        (("secondary", "--nodes-config", "/no/such.json", "0", "--chunk", "FINISHER"), "cannot be read"),
        (("ask", "CHECKPOINT", "x", "--nodes-config", "/no/such.json"), "cannot be read"),
        (("ask", "CHECKPOINT", "x", "--nodes-config", "CONFIG", "--n-nodes", "3"), "leave these options out"),
        (("ask", "CHECKPOINT", "x", "--nodes-config", "CONFIG", "--layers", "2,2,2"), "leave these options out"),
        (("ask", "CHECKPOINT", "x", "--nodes-config", "CONFIG", "--wait-s", "0"), "wait_s must be above 0"),
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
    chunks: Path,
    plain: ManualCluster,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("ELSEWHERE", "LAYERS"):
        changed = json.loads(plain.config.read_text())
        if name == "ELSEWHERE":
            changed["nodes"]["secondary"][0]["addr"] = "10.11.12.13"
        else:
            for one in (changed["nodes"]["starter"], *changed["nodes"]["secondary"]):
                one["layers"] = 1
        (tmp_path / name).write_text(json.dumps(changed))
    places = {
        "CHECKPOINT": checkpoint,
        "CONFIG": plain.config,
        "FINISHER": chunks / "model_finisher.safetensors",
        **{name: tmp_path / name for name in ("ELSEWHERE", "LAYERS")},
    }
    assert exit_code(monkeypatch, *(places.get(word, word) for word in words)) == 2
    assert message in capfd.readouterr().err


def test_a_missing_certificate_is_named_before_anything_is_loaded(
    checkpoint: Path,
    chunks: Path,
    plain: ManualCluster,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ENABLE_ENCRYPTION", "1")
    chunk = chunks / "model_secondary0.safetensors"
    assert exit_code(monkeypatch, "secondary", "--chunk", chunk, "--certs", "/no/such") == 2
    assert "run `mdi certs node secondary0`" in capfd.readouterr().err
    words: list[str | Path] = ["ask", checkpoint, "x", "--nodes-config", plain.config, "--certs", "/no/such"]
    assert exit_code(monkeypatch, *words) == 2
    assert "run `mdi certs node starter`" in capfd.readouterr().err
    monkeypatch.setenv("ENABLE_ENCRYPTION", "maybe")
    assert exit_code(monkeypatch, *words) == 2
    assert "ENABLE_ENCRYPTION must be 1 or 0" in capfd.readouterr().err
