"""The two-node example of the original guide, word for word with `mdi` in front, over encrypted links."""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path

import httpx
import pytest
from testing.links import free_port
from testing.processes import ENVIRONMENT, Process, serving

from mdi.cli import app
from mdi.core.sampling import SamplingParams
from mdi.engine import Engine

PREPARE = "mdi prepare bundled --ckpt-folder checkpoints --n-nodes 2 --dtype bfloat16"
CERTIFICATES = ("mdi certs init", "mdi certs node starter", "mdi certs node secondary0")
SECONDARY = (
    "secondary --chunk checkpoints/bundled/chunks/2nodes/model_secondary0 --nodes-config nodes.json 0 --dtype bfloat16"
)
SERVE = "--host 127.0.0.1 --nodes-config nodes.json --sequence-length 1024"

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_process_left")]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of every command, with a nodes-config as upstream writes it, without a finisher."""
    monkeypatch.chdir(tmp_path)
    starter, secondary = ({"addr": "127.0.0.1", "communication": {"port": free_port()}} for _ in range(2))
    inference = {"port_in": 5088, "port_out": 5089}
    nodes = {"starter": {**starter, "inference": inference}, "secondary": [{**secondary, "inference": inference}]}
    (tmp_path / "nodes.json").write_text(json.dumps({"nodes": nodes}))
    return tmp_path


def run(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a command in this process, which is faster than starting one."""
    monkeypatch.setattr(sys, "argv", command.split())
    with pytest.raises(SystemExit) as ended:
        app.main()
    assert not ended.value.code


def test_the_two_nodes_answer_as_one_process_does(
    folder: Path, photograph: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    for command in (PREPARE, f"{PREPARE} --skip-convert", *CERTIFICATES):
        run(command, monkeypatch)
    assert not (folder / "certs" / "finisher.pem").exists()
    image = f"data:image/png;base64,{base64.b64encode(photograph).decode()}"
    content = [{"type": "image", "image": image}, {"type": "text", "text": "What is in this picture?"}]
    messages = [{"role": "user", "content": content}]
    body = {"messages": messages, "max_tokens": 12, "n_samples": 2, "temperature": 0}
    with Engine("checkpoints/bundled", dtype="bfloat16") as engine:
        alone = engine.chat(messages, SamplingParams(max_tokens=12, temperature=0)).text
    encrypted = {**ENVIRONMENT, "ENABLE_ENCRYPTION": "1"}
    node = Process(SECONDARY.split(), encrypted)
    try:
        assert "encrypted" in node.wait_for_line("listens")
        with serving("checkpoints/bundled", *SERVE.split(), environment=encrypted) as (_, url):
            answer = httpx.post(f"{url}/generate/multimodal", json=body, timeout=60)
            assert answer.json() == {"samples": [alone] * 2}, answer.text
            [_, last] = httpx.get(f"{url}/v1/nodes").json()["nodes"]
            assert (last["name"], last["node"], last["spare"]) == ("finisher", "secondary0", "")
    finally:
        node.kill()


@pytest.mark.parametrize("name", ["model_secondary0.safetensors", "model_secondary0", "model_finisher.safetensors"])
def test_a_chunk_of_another_node_is_still_refused(
    name: str, folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = json.loads((folder / "nodes.json").read_text())
    nodes["nodes"]["secondary"].append({"addr": "127.0.0.1", "communication": {"port": free_port()}})
    (folder / "nodes.json").write_text(json.dumps(nodes))
    words = f"mdi secondary --nodes-config nodes.json {int('secondary' in name)} --chunk {name}"
    monkeypatch.setattr(sys, "argv", words.split())
    with pytest.raises(SystemExit) as ended:
        app.main()
    assert ended.value.code == 2
    assert "is the chunk of" in capfd.readouterr().err
