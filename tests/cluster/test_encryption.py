"""What someone on the cable sees: real node processes behind proxies that record every byte."""

from __future__ import annotations

import base64
import queue
import shutil
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
import torch
from testing.links import RecordingProxy
from testing.own_link import OwnLink

from mdi.checkpoint.loader import load_chunk
from mdi.checkpoint.manifest import Manifest
from mdi.checkpoint.prepare import prepare
from mdi.checkpoint.source import open_source
from mdi.cluster.delivery import Delivery
from mdi.cluster.launchers.local import LocalLauncher
from mdi.cluster.link import PipelineSettings
from mdi.cluster.node_client import NodeAddress
from mdi.core.batch import Batch, Result, Slice, TokenSampling
from mdi.models.stage import Stage
from mdi.rpc import codec
from mdi.rpc.authority import Authority
from mdi.rpc.tls import Identity

pytestmark = pytest.mark.usefixtures("no_process_left")
GREEDY = TokenSampling(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, sample=0, position=0)
N_TOKENS = 40


@pytest.fixture(scope="module")
def chunks(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    path = tmp_path_factory.mktemp("encryption") / "tiny"
    shutil.copytree(tiny_checkpoint, path, ignore=shutil.ignore_patterns("chunks"))
    folder = prepare(open_source(path), 3)
    return [folder / chunk.file for chunk in Manifest.read(folder).chunks]


class Run:
    """One batch over two nodes: what passed between them, and what a reader would look for in it."""

    def __init__(self, chunks: list[Path], authority: Authority | None) -> None:
        with ExitStack() as stack:
            launcher = LocalLauncher(chunks[1:], dtype="float32", device="cpu", threads=1, authority=authority)
            stack.callback(launcher.close)
            launcher.start()
            recorders = {
                node.name: stack.enter_context(closing(RecordingProxy(node.address))) for node in launcher.nodes
            }
            nodes = [NodeAddress(name, recorder.address) for name, recorder in recorders.items()]
            digest = Manifest.read(chunks[0].parent).digest
            hidden, result = _send(chunks[0], nodes, digest, authority.issue("starter") if authority else None)
            self.recorded = {name: recorder.recorded for name, recorder in recorders.items()}
        self.secrets = {
            "hidden states": hidden.contiguous().numpy().tobytes()[1000:1064],
            "tokens": codec.encode_result(result, 1).SerializeToString(),
            "plan": digest.encode(),
            "addresses": nodes[1].address.encode(),
        }

    def seen(self, node: str, secret: bytes) -> bool:
        return any(secret in stream for stream in self.recorded[node])


def _send(chunk: Path, nodes: list[NodeAddress], digest: str, identity: Identity | None) -> tuple[torch.Tensor, Result]:
    inbox: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
    first = Stage(load_chunk(chunk), n_slots=1, sequence_length=64)
    batch = Batch(7, (Slice(0, 0, N_TOKENS, (GREEDY,)),), torch.arange(N_TOKENS).repeat(3, 1))
    hidden = first.run(batch, first.embed(torch.arange(N_TOKENS)))
    assert isinstance(hidden, torch.Tensor)
    link = OwnLink(nodes, PipelineSettings(digest, 1, 64), inbox.put, identity=identity)
    link.send(batch, hidden)
    result = inbox.get(timeout=60)
    link.close()
    assert isinstance(result, Result)
    return hidden, result


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority.create()


@pytest.fixture(scope="module")
def encrypted(chunks: list[Path], authority: Authority) -> Run:
    return Run(chunks, authority)


@pytest.fixture(scope="module")
def plain(chunks: list[Path]) -> Run:
    return Run(chunks, None)


@pytest.mark.parametrize(
    ("node", "secret"),
    [
        ("secondary0", "hidden states"),
        ("secondary0", "plan"),
        ("secondary0", "addresses"),
        ("finisher", "tokens"),
        ("finisher", "plan"),
    ],
)
def test_an_encrypted_run_shows_nothing_that_a_plain_one_does(
    plain: Run, encrypted: Run, node: str, secret: str
) -> None:
    assert plain.seen(node, plain.secrets[secret])
    assert not encrypted.seen(node, encrypted.secrets[secret])
    assert sum(map(len, encrypted.recorded[node])) > sum(map(len, plain.recorded[node]))  # and all did pass there


def test_the_hidden_states_between_two_nodes_are_encrypted_too(plain: Run, encrypted: Run) -> None:
    assert max(map(len, plain.recorded["finisher"])) > N_TOKENS * 64 * 4
    assert max(map(len, encrypted.recorded["finisher"])) > N_TOKENS * 64 * 4
    for stream in encrypted.recorded["finisher"]:
        assert stream[:1] in (b"\x16", b"")  # the first record of TLS: a handshake
        assert b"mdi.Node" not in stream
    assert any(stream.startswith(b"PRI * HTTP/2.0") for stream in plain.recorded["finisher"])


def test_no_key_passes(encrypted: Run, authority: Authority, tmp_path: Path) -> None:
    authority.save(tmp_path)
    pem = (tmp_path / "ca.key").read_bytes()
    der = base64.b64decode(b"".join(pem.splitlines()[1:-1]))
    secret = der[36:68]  # of the 32 bytes of the private number, in PKCS 8
    assert authority.key.private_numbers().private_value == int.from_bytes(secret, "big")
    for node in encrypted.recorded:
        assert not encrypted.seen(node, secret)
        assert not encrypted.seen(node, b"PRIVATE KEY")
