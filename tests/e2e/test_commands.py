"""The commands as a user types them: real processes, real signals."""

from __future__ import annotations

import re
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from testing.processes import ENVIRONMENT, mdi, serving

from mdi.checkpoint.prepare import prepare
from mdi.checkpoint.source import open_source
from mdi.cli import app as cli
from mdi.core.quantization import ModelQuantization


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "tiny"
    shutil.copytree(tiny_checkpoint, path, ignore=shutil.ignore_patterns("chunks"))
    return path


@pytest.fixture(scope="module")
def picture(photograph: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "cup.png"
    path.write_bytes(photograph)
    return path


def wait_until_gone(processes: list[psutil.Process], timeout_s: float = 10) -> None:
    _, alive = psutil.wait_procs(processes, timeout=timeout_s)
    assert not alive, f"{len(alive)} node processes outlived their parent"


def test_three_nodes_answer_as_one_does(checkpoint: Path, picture: Path) -> None:
    question = ("What is this?", "--image", picture, "--max-tokens", "8", "--temperature", "1", "--seed", "4")
    alone, spread = mdi("ask", checkpoint, *question), mdi("ask", checkpoint, *question, "--n-nodes", "3")
    assert alone.returncode == spread.returncode == 0, spread.stderr
    assert alone.stdout.strip()
    assert alone.stdout == spread.stdout


@pytest.fixture
def mdi_here(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs a command in this process, because starting one takes seconds; its standard output."""

    def run(*arguments: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", ["mdi", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capfd.readouterr()
        assert ended.value.code == 0, printed.err
        return printed.out

    return run


def test_a_file_of_questions_is_answered_paragraph_by_paragraph(
    checkpoint: Path, tmp_path: Path, mdi_here: Callable[..., str]
) -> None:
    questions = tmp_path / "questions.txt"
    questions.write_text("One?\n\nTwo,\nstill two?\n\n\nThree?\n")
    settings = ("--max-tokens", "3", "--temperature", "1", "--seed", "1")
    together = mdi_here("ask", checkpoint, f"FILE:{questions}", *settings)
    single = [mdi_here("ask", checkpoint, text, *settings) for text in ("One?", "Two,\nstill two?", "Three?")]
    assert together == "".join(single)


def test_prepare_and_plan_agree(checkpoint: Path) -> None:
    prepared = mdi("prepare", checkpoint, "--n-nodes", "4", "--layers", "1,2,2,1", "--dtype", "bfloat16")
    assert prepared.returncode == 0, prepared.stderr
    files = {path.name for path in (checkpoint / "chunks" / "4nodes").iterdir()}
    roles = ("starter", "secondary0", "secondary1", "finisher")
    assert files == {"manifest.json", *(f"model_{role}.safetensors" for role in roles)}
    shown = mdi("plan", checkpoint, "--n-nodes", "4", "--layers", "1,2,2,1")
    for role, layers in zip(roles, ("0-0 (1)", "1-2 (2)", "3-4 (2)", "5-5 (1)"), strict=True):
        assert re.search(rf"{role}\W+{re.escape(layers)}", shown.stdout)


@pytest.mark.parametrize("split", [pytest.param(("--n-nodes", "2"), marks=pytest.mark.slow), ("--shards", "2")])
def test_verify_finds_no_difference_to_transformers(split: tuple[str, str], checkpoint: Path, picture: Path) -> None:
    report = mdi("verify", checkpoint, "What is this?", "--image", picture, *split, "--max-tokens", "6")
    assert report.returncode == 0, report.stderr + report.stdout
    assert "all 6 greedy tokens are equal" in report.stdout
    assert "greedy answer: '" in report.stdout
    found = re.search(r"relative to the largest logit: (\S+);", report.stdout)
    assert found
    assert float(found[1]) < 1e-4


def test_the_demo_answers_and_draws_its_answers(tmp_path: Path) -> None:
    shown = mdi("demo", "--out", tmp_path)
    assert shown.returncode == 0, shown.stderr
    found = re.search(r"(\d+) of (\d+) answers are right", shown.stdout)
    assert found
    assert int(found[1]) >= 10
    assert "secondary0" in shown.stdout
    assert re.search(r"model calls +\S+ find_maker\(", shown.stdout)
    assert "The maker is 274." in shown.stdout
    with Image.open(tmp_path / "answers.png") as sheet:
        assert len(sheet.convert("RGB").getcolors(2**24) or ()) > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ask", "CHECKPOINT", "x", "--image", "/no/such.png"), "no file"),
        (("ask", "CHECKPOINT", "x", "--max-tokens", "-2"), "max_tokens"),
        (("ask", "CHECKPOINT", "x", "--temperature", "nan"), "temperature"),
        (("ask", "CHECKPOINT", "FILE:/no/such.txt"), "no file"),
        (("ask", "CHECKPOINT", "x" * 300, "--sequence-length", "200"), "sequence length"),
        (("ask", "/no/such/checkpoint", "x"), "no checkpoint folder"),
        (("ask", "CHECKPOINT", "x", "--n-nodes", "7"), "6 layers"),
        (("prepare", "CHECKPOINT", "--n-nodes", "2", "--layers", "a,b"), "--layers"),
        (("prepare", "CHECKPOINT", "--dtype", "int4"), "int4"),
        (
            ("prepare", "CHECKPOINT", "--quantization", "int3"),
            "quantization must be one of int8, int8-32, int4, none, got 'int3'",
        ),
        (
            ("plan", "CHECKPOINT", "--vision-quantization", "fp8"),
            "vision_quantization must be one of int8, int8-32, int4, none",
        ),
        (("ask", "CHECKPOINT", "x", "--head-quantization", "Q4_0"), "head_quantization must be one of"),
        (("serve", "CHECKPOINT", "--quantization", ""), "quantization must be one of"),
        (("bench", "CHECKPOINT", "--quantization", "INT8"), "quantization must be one of"),
        (("serve", "CHECKPOINT", "--device", "cuda:9"), "cuda:9"),
        (("serve",), "CHECKPOINT"),
        (("serve", "CHECKPOINT", "--replicas", "2"), "--replicas are for a Ray cluster: name it with --ray"),
        (("serve", "CHECKPOINT", "--ray", "auto", "--replicas", "0"), "2, 1:4; got '0'"),
        (("serve", "CHECKPOINT", "--ray", "auto", "--replicas", "3:1"), "2, 1:4; got '3:1'"),
        (("serve", "CHECKPOINT", "--ray", "auto", "--replicas", "2", "--port", "0"), "name it with --port"),
        (("secondary", "--chunk", "/no/such.safetensors"), "no chunk"),
        (("secondary", "--chunk", "x", "--listen", "8.8.8.8:0"), "loopback"),
        (("secondary", "--chunk", "x", "--listen", "nonsense"), "host:port"),
        (("plan", "CHECKPOINT", "--n-nodes", "0"), "n-nodes"),
        (("demo", "--out", "/dev/null/demo"), "--out"),
    ],
    ids=lambda value: " ".join(value)[:50] if isinstance(value, tuple) else "",
)
def test_bad_commands_end_with_exit_code_2_and_the_cause(
    arguments: tuple[str, ...],
    message: str,
    checkpoint: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = [str(checkpoint) if argument == "CHECKPOINT" else argument for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["mdi", *words])
    with pytest.raises(SystemExit) as ended:  # in this process: starting one takes seconds
        cli.main()
    assert ended.value.code == 2
    assert message in capfd.readouterr().err


@pytest.mark.parametrize("damage", ["NaN", "format"])
def test_quantised_weights_that_cannot_be_used_end_a_command_with_exit_code_2_and_the_cause(
    damage: str, checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, name = Path(shutil.copytree(checkpoint, tmp_path / "copy")), "model.layers.3.mlp.gate_proj.weight"
    if damage == "NaN":
        weights = load_file(folder / "model.safetensors")
        weights[name][5, 6] = torch.nan
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        words = ["prepare", str(folder), "--n-nodes", "2", "--quantization", "int8"]
        expected = f"error: the tensor {name} cannot be quantised: it has numbers that are infinite or none"
    else:
        manifest = prepare(open_source(folder), 2, quantization=ModelQuantization("int4")) / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"int4"', '"int2"'))
        words = ["secondary", "--chunk", str(manifest.parent / "model_finisher.safetensors")]
        expected = "the quantisation 'int2' is unknown: use one of int8, int8-32, int4"
    monkeypatch.setattr(sys, "argv", ["mdi", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    [line] = capfd.readouterr().err.splitlines()[-1:]
    assert expected in line


def test_a_bad_command_ends_the_process_with_exit_code_2() -> None:
    done = mdi("ask", "/no/such/checkpoint", "x")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")


def test_a_port_in_use_is_named(checkpoint: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = mdi("serve", checkpoint, "--port", port)
        assert (done.returncode, port in done.stderr) == (2, True)
        done = mdi("secondary", "--chunk", checkpoint / "x", "--listen", f"127.0.0.1:{port}")
        assert (done.returncode, port in done.stderr) == (2, True)


def test_a_server_of_three_nodes_answers_and_ends_with_its_nodes(checkpoint: Path, picture: Path) -> None:
    with serving(checkpoint, "--n-nodes", "3", environment=ENVIRONMENT) as (process, url):
        nodes = psutil.Process(process.pid).children(recursive=True)
        assert len(nodes) == 2
        upload = {"image": ("cup.png", picture.read_bytes(), "image/png")}
        answer = httpx.post(
            f"{url}/generate/multimodal", files=upload, data={"prompt": "?", "max_tokens": "4"}, timeout=60
        )
        assert len(answer.json()["samples"]) == 1
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        wait_until_gone(nodes)


@pytest.mark.slow
def test_no_node_outlives_a_server_killed_with_sigkill(checkpoint: Path) -> None:
    with serving(checkpoint, "--n-nodes", "3", environment=ENVIRONMENT) as (process, _url):
        nodes = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait(10)
        wait_until_gone(nodes)


def wait_for_status(url: str, status: int) -> httpx.Response:
    deadline = time.monotonic() + 90
    while (answer := httpx.get(url, timeout=30)).status_code != status:
        assert time.monotonic() < deadline, answer.text
        time.sleep(0.05)
    return answer


def test_a_server_brings_a_killed_node_back_and_answers_as_before(checkpoint: Path) -> None:
    question = {"prompt": "x", "max_tokens": 150, "temperature": 1, "seed": 3}
    with serving(checkpoint, "--n-nodes", "2", environment=ENVIRONMENT) as (process, url):
        assert httpx.get(f"{url}/health/ready", timeout=30).status_code == 200
        before = httpx.post(f"{url}/generate", json=question, timeout=120).json()
        [node] = psutil.Process(process.pid).children(recursive=True)
        node.kill()
        assert httpx.post(f"{url}/generate", json=question, timeout=120).json() == before
        wait_for_status(f"{url}/health/ready", 200)
        shown = httpx.get(f"{url}/v1/nodes").json()
        assert [node["restarts"] for node in shown["nodes"]] == [0, 1]
        assert (shown["recoveries"], shown["failed_requests"]) == (1, 0)


@pytest.mark.slow
def test_a_server_told_to_end_brings_a_node_back_to_finish_what_runs(checkpoint: Path) -> None:
    question = {"prompt": "x", "max_tokens": 200, "temperature": 1, "seed": 3, "stream": True}
    with serving(checkpoint, "--n-nodes", "2", environment=ENVIRONMENT) as (process, url):
        [node] = psutil.Process(process.pid).children(recursive=True)
        with httpx.stream("POST", f"{url}/generate", json=question, timeout=120) as answer:
            lines = answer.iter_lines()
            next(lines)
            node.kill()
            process.send_signal(signal.SIGTERM)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        process.wait(30)


@pytest.mark.slow
def test_a_server_whose_node_does_not_come_back_in_time_says_so(checkpoint: Path) -> None:
    options = ("--n-nodes", "2", "--recovery-timeout", "0.05")
    with serving(checkpoint, *options, environment=ENVIRONMENT) as (process, url):
        [node] = psutil.Process(process.pid).children(recursive=True)
        assert httpx.get(f"{url}/health").status_code == 200
        node.kill()
        assert "finisher" in wait_for_status(f"{url}/health", 503).json()["detail"]
        answer = httpx.post(f"{url}/generate", json={"prompt": "x"})
        assert answer.status_code == 503
        assert "finisher" in answer.json()["detail"]
