"""One model over three hosts on an encrypted network: nodes killed, frozen and cut off while answers are written.

Real processes, each on its host, manual nodes. An answer that lived through a fault is compared with the same
question's answer afterwards, when all is well.
"""

from __future__ import annotations

import base64
import io
import json
import shutil
import signal
import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from PIL import Image
from testing.checkpoints import tiny_config
from testing.hosts import Capture, Host, Network, why_not
from testing.manual_cluster import ManualCluster, Place
from testing.processes import node_processes, serving
from testing.waiting import wait_for

from mdi import Engine, SamplingParams
from mdi.checkpoint.loader import load_chunk
from mdi.checkpoint.prepare import prepare
from mdi.checkpoint.random_weights import write_random_checkpoint
from mdi.checkpoint.source import open_source
from mdi.core.batch import Batch, Slice
from mdi.models.stage import Stage
from mdi.prompt.assembly import Prompt
from mdi.prompt.builder import PixelRange
from mdi.rpc import node_pb2

REASON = why_not()
NAMES = ("starter", "secondary0", "finisher")
NODES = NAMES[1:]
PORT = 5000
LONG_S = 120  # nothing takes as long
pytestmark = [pytest.mark.slow, pytest.mark.skipif(REASON is not None, reason=str(REASON))]
Questions = list[dict[str, Any]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny, but with a deep vision tower, so that an image takes a while.

    Every token's text can be told from others, and none ends an answer.
    """
    path = tmp_path_factory.mktemp("hosts") / "tiny"
    write_random_checkpoint(path, tiny_config(vision_config={"depth": 96}))
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {
        f"|{number}" if number in range(128, 256) else text: number for text, number in vocabulary.items()
    }
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (path / "generation_config.json").write_text('{"eos_token_id": []}')
    return path


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with Network(*NAMES) as network:
        yield network


class Cluster:
    """A server on the first host, and its nodes on the others, started in the order finisher, starter, secondary."""

    def __init__(self, network: Network, checkpoint: Path, nodes: ManualCluster) -> None:
        self.hosts = network.hosts
        self.nodes = nodes
        self._checkpoint = checkpoint
        self._server = ExitStack()
        nodes.start("finisher")
        late = threading.Timer(1.0, nodes.start, ["secondary0"])
        late.start()
        self.serve()
        late.join()

    def serve(self) -> None:
        """Starts the server, and returns when all nodes are there; one that runs is killed."""
        self._server.close()
        options = [*self.nodes.starter_options, "--wait-s", str(LONG_S), "--recovery-timeout", str(LONG_S)]
        running = serving(self._checkpoint, *options, environment=self.nodes.environment)
        with self.hosts["starter"].inside():
            self._process, self._url = self._server.enter_context(running)

    def close(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(LONG_S)
        self._server.close()

    def get(self, path: str) -> Any:
        with self.hosts["starter"].inside():
            return httpx.get(self._url + path, timeout=LONG_S).json()

    def ask(self, question: dict[str, Any]) -> Answer:
        """Begins to ask."""
        return Answer(self.hosts["starter"], self._url, question)

    @property
    def sent_bytes(self) -> int:
        """What the starter has sent to its nodes."""
        return int(self.get("/v1/nodes")["nodes"][0]["sent_bytes"])

    @property
    def recoveries(self) -> int:
        return int(self.get("/v1/nodes")["recoveries"])

    @property
    def well(self) -> bool:
        shown = self.get("/v1/nodes")
        return not shown["recovering"] and {node["state"] for node in shown["nodes"]} == {"ready"}

    def start_anew(self, name: str) -> None:
        self.nodes.process(name).kill()
        self.nodes.start(name)


class Answer:
    """An answer that is being written. pieces: what there is of it."""

    def __init__(self, host: Host, url: str, question: dict[str, Any]) -> None:
        self.pieces: list[str] = []
        self._reason = ""
        self._host = host
        self._url = url
        self._question = question
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def text(self) -> str:
        """The whole of it."""
        self._thread.join(LONG_S)
        assert self._reason == "length", self._reason or "the answer never ended"
        return "".join(self.pieces)

    def _read(self) -> None:
        url, body = f"{self._url}/generate/multimodal", {**self._question, "stream": True}
        try:
            with self._host.inside(), httpx.stream("POST", url, json=body, timeout=LONG_S) as response:
                for line in response.iter_lines():
                    self._take(line)
        except httpx.HTTPError as error:
            self._reason = repr(error)

    def _take(self, line: str) -> None:
        if not line.startswith("data: {"):
            return
        event = json.loads(line.removeprefix("data: "))
        self._reason = event.get("finish_reason") or str(event.get("error") or "")
        if event.get("text"):
            self.pieces.append(event["text"])


@contextmanager
def cluster_on(
    network: Network, checkpoint: Path, folder: Path, *, port: int = PORT, encrypted: bool
) -> Iterator[Cluster]:
    own = Path(shutil.copytree(checkpoint, folder / "tiny"))
    chunks = prepare(open_source(own), len(NAMES))
    places = {name: Place(host.address, port, host.inside) for name, host in network.hosts.items()}
    with (
        ManualCluster(folder, places, chunks=chunks, encrypted=encrypted) as nodes,
        closing(Cluster(network, own, nodes)) as cluster,
    ):
        yield cluster


@pytest.fixture(scope="module")
def shared(network: Network, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster_on(network, checkpoint, tmp_path_factory.mktemp("encrypted"), encrypted=True) as cluster:
        yield cluster
    assert node_processes() == []


@pytest.fixture
def cluster(shared: Cluster) -> Iterator[Cluster]:
    """All nodes are there, before and after."""
    wait_for(lambda: shared.well)
    yield shared
    wait_for(lambda: shared.well)
    assert shared.get("/v1/nodes")["failed_requests"] == 0
    assert shared.get("/health/ready") == {"status": "ready"}


def questions(text: str, max_tokens: int, image: str | None = None) -> Questions:
    """The same twice, once greedy and once sampled."""
    picture = [{"type": "image", "image": image}] if image else []
    messages = [{"role": "user", "content": [*picture, {"type": "text", "text": text}]}]
    return [
        {"messages": messages, "max_tokens": max_tokens, "temperature": temperature, "seed": 5}
        for temperature in (0, 1)
    ]


@contextmanager
def undisturbed_answers(cluster: Cluster, questions: Questions) -> Iterator[list[Answer]]:
    """Asks, and in the end compares the answers with those to the same questions when nothing happens."""
    recoveries = cluster.recoveries
    answers = [cluster.ask(question) for question in questions]
    yield answers
    texts = [answer.text() for answer in answers]
    assert cluster.recoveries > recoveries, "no node was lost"
    wait_for(lambda: cluster.well)
    again = cluster.recoveries
    assert texts == [cluster.ask(question).text() for question in questions]
    assert cluster.recoveries == again, "a node was lost in the undisturbed run"


def test_all_nodes_are_there_whatever_the_order_they_were_started_in(cluster: Cluster) -> None:
    assert [node["name"] for node in cluster.get("/v1/nodes")["nodes"]] == list(NAMES)
    for name in NODES:
        assert f"node {name} listens at {cluster.hosts[name].address}:{PORT}, encrypted" in cluster.nodes.log(name)


@pytest.mark.parametrize("victim", NODES)
def test_an_answer_survives_a_node_killed_during_prefill(cluster: Cluster, victim: str) -> None:
    sent_bytes = cluster.sent_bytes
    with (
        undisturbed_answers(cluster, questions(f"{victim} " * 200, max_tokens=20)) as answers,
        cluster.hosts["starter"].throttled("4mbit"),  # the prompt's hidden states are a second on their way
    ):
        wait_for(lambda: cluster.sent_bytes > sent_bytes)
        assert not any(answer.pieces for answer in answers)
        cluster.start_anew(victim)


@pytest.mark.parametrize("victim", NODES)
def test_an_answer_survives_a_node_killed_during_decode(cluster: Cluster, victim: str) -> None:
    with undisturbed_answers(cluster, questions(f"Speak, {victim}.", max_tokens=150)) as answers:
        wait_for_words(answers)
        cluster.start_anew(victim)


@pytest.mark.parametrize("victim", NODES)
def test_an_answer_survives_a_node_killed_while_an_image_is_encoded(cluster: Cluster, victim: str) -> None:
    sent_bytes = cluster.sent_bytes
    with undisturbed_answers(cluster, questions("What?", max_tokens=20, image=noise(NODES.index(victim)))):
        wait_for(lambda: cluster.get("/v1/nodes")["nodes"][0]["busy_share"] > 0.3)
        assert cluster.sent_bytes == sent_bytes
        cluster.start_anew(victim)


def test_a_server_started_anew_finds_the_same_nodes(cluster: Cluster) -> None:
    [question, _] = questions("Again.", max_tokens=20)
    before, pids = cluster.ask(question).text(), [cluster.nodes.process(name).popen.pid for name in NODES]
    cluster.serve()
    assert cluster.ask(question).text() == before
    assert [node["pid"] for node in cluster.get("/v1/nodes")["nodes"][1:]] == pids


def test_an_answer_survives_a_frozen_node_that_thaws(cluster: Cluster) -> None:
    with undisturbed_answers(cluster, questions("Freeze.", max_tokens=150)) as answers:
        wait_for_words(answers)
        cluster.nodes.process("finisher").popen.send_signal(signal.SIGSTOP)
        wait_for(lambda: cluster.get("/health")["status"] == "recovering")
        cluster.nodes.process("finisher").popen.send_signal(signal.SIGCONT)


def test_an_answer_survives_a_cable_that_is_pulled_and_plugged_in_again(cluster: Cluster) -> None:
    with undisturbed_answers(cluster, questions("Pull.", max_tokens=150)) as answers:
        wait_for_words(answers)
        cluster.hosts["secondary0"].cut()
        wait_for(lambda: cluster.get("/health")["status"] == "recovering")
        cluster.hosts["secondary0"].heal()


def test_an_answer_survives_the_starters_peer_started_anew_twice(cluster: Cluster) -> None:
    with undisturbed_answers(cluster, questions("Twice.", max_tokens=250)) as answers:
        for _ in range(2):
            wait_for(lambda: cluster.well)
            wait_for_words(answers)
            cluster.start_anew("secondary0")
            wait_for(lambda: cluster.get("/health")["status"] == "recovering")


def test_a_slow_cable_that_loses_frames_changes_nothing(cluster: Cluster) -> None:
    recoveries, asked = cluster.recoveries, questions("Late. " * 50, max_tokens=20)
    with cluster.hosts["finisher"].worn(delay_s=0.01, loss=0.02):
        texts = [cluster.ask(question).text() for question in asked]
    assert texts == [cluster.ask(question).text() for question in asked]
    assert cluster.recoveries == recoveries


def wait_for_words(answers: list[Answer]) -> None:
    """Until all answers have gone on for a while."""
    before = [len(answer.pieces) for answer in answers]
    wait_for(lambda: all(len(answer.pieces) > n + 5 for n, answer in zip(before, answers, strict=True)))
    assert all(answer.running for answer in answers)


def noise(seed: int) -> str:
    """An image of 484 tokens that no cache has seen, as a data: URL."""
    pixels = np.random.default_rng(seed).integers(0, 256, (616, 616, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


PROMPT = "A secret that is nobody's business but the asker's. " * 4
HIDDEN, TOKENS, PROMPTS, KEYS = "hidden states", "tokens", "prompt and answer", "keys"


@pytest.fixture(scope="module")
def secrets(checkpoint: Path, shared: Cluster) -> dict[str, list[bytes]]:
    """What someone on the cable would look for; any part of a kind gives it away."""
    with Engine(checkpoint) as alone:
        completion = alone.chat(PROMPT, SamplingParams(temperature=0, max_tokens=20))
        prompt = alone._prompts.build(PROMPT, PixelRange(None, None))
    hidden = hidden_states(checkpoint, prompt)
    return {
        HIDDEN: [row.numpy().tobytes() for row in hidden],
        TOKENS: [struct.pack("<d", logprob) for logprob in completion.logprobs],  # each beside its token's id
        PROMPTS: [PROMPT.encode(), completion.text.encode(), packed(prompt.token_ids), packed(completion.token_ids)],
        KEYS: [part for path in shared.nodes.keys for part in key_parts(path)],
    }


def hidden_states(checkpoint: Path, prompt: Prompt) -> torch.Tensor:
    """What the starter of three sends of a prompt: [tokens, hidden_size]."""
    chunk = load_chunk(prepare(open_source(checkpoint), len(NAMES)) / "model_starter.safetensors")
    first = Stage(chunk, n_slots=1, sequence_length=len(prompt.token_ids))
    batch = Batch(0, (Slice(0, 0, len(prompt.token_ids)),), prompt.positions)
    hidden = first.run(batch, first.embed(torch.tensor(prompt.token_ids)))
    assert isinstance(hidden, torch.Tensor)
    return hidden


def packed(token_ids: Sequence[int]) -> bytes:
    """As a message would have them."""
    return node_pb2.BatchResult(token_ids=token_ids).SerializeToString()


def key_parts(path: Path) -> list[bytes]:
    """A private key as its number, and as the lines of its file."""
    key = load_pem_private_key(path.read_bytes(), None)
    assert isinstance(key, EllipticCurvePrivateKey)
    return [key.private_numbers().private_value.to_bytes(32), *path.read_bytes().splitlines()[1:-1]]


def captured(network: Network, cluster: Cluster) -> Capture:
    """One question, and what passed the switch meanwhile."""
    with network.capture() as capture:
        cluster.ask(questions(PROMPT, max_tokens=20)[0]).text()
    return capture


def found(capture: Capture, secrets: dict[str, list[bytes]]) -> set[str]:
    return {kind for kind, parts in secrets.items() if any(capture.shows(part) for part in parts)}


def test_an_encrypted_run_shows_nothing_on_the_cables(
    network: Network, cluster: Cluster, secrets: dict[str, list[bytes]]
) -> None:
    capture = captured(network, cluster)
    assert sum(map(len, capture.streams())) > sum(map(len, secrets[HIDDEN]))
    assert found(capture, secrets) == set()


def test_the_same_run_in_the_clear_shows_what_nodes_tell_each_other(
    network: Network, checkpoint: Path, secrets: dict[str, list[bytes]], tmp_path: Path
) -> None:
    with cluster_on(network, checkpoint, tmp_path, port=PORT + 1, encrypted=False) as cluster:
        assert found(captured(network, cluster), secrets) == {HIDDEN, TOKENS}


def test_whatever_passes_in_the_clear_would_be_found(network: Network, secrets: dict[str, list[bytes]]) -> None:
    """In packets so small that none holds a secret by itself."""
    sender, receiver = (network.hosts[name] for name in NODES)
    address = (receiver.address, PORT + 2)
    everything = b"".join(part for parts in secrets.values() for part in parts)
    with receiver.inside():
        listener = socket.create_server(address)
    with sender.inside():
        connection = socket.create_connection(address)
    accepted, _ = listener.accept()
    with listener, connection, accepted, network.capture() as capture:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for start in range(0, len(everything), 7):
            connection.sendall(everything[start : start + 7])
        assert accepted.recv(len(everything), socket.MSG_WAITALL) == everything
    assert found(capture, secrets) == set(secrets)
