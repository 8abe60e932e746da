"""A node of another version: it joins where the protocols allow it, and else the error names the side to upgrade."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from testing.links import call_node, free_port
from testing.nodes import node_here

from mdi import Engine, SamplingParams
from mdi.checkpoint.cache import Cache
from mdi.checkpoint.manifest import Manifest
from mdi.checkpoint.prepare import prepare
from mdi.checkpoint.source import open_source
from mdi.core.errors import LinkError
from mdi.node.settings import NodeSettings
from mdi.rpc import node_pb2
from mdi.rpc.version import HERE, Protocol

QUESTION, PARAMS = "Who are you?", SamplingParams(max_tokens=4, temperature=0)
NEXT = HERE.version + 1


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("versions") / "tiny"
    shutil.copytree(tiny_checkpoint, path, ignore=shutil.ignore_patterns("chunks"))
    prepare(open_source(path), 2)
    return path


@pytest.fixture
def settings(tmp_path: Path) -> NodeSettings:
    """A node that waits for its weights."""
    return NodeSettings("finisher", None, listen="", cache=Cache(tmp_path / "cache", 10**9))


def ask(checkpoint: Path, address: str, folder: Path) -> str:
    """The answer of a server here and the node at an address."""
    host, _, port = address.rpartition(":")
    finisher = {"addr": host, "communication": {"port": int(port)}}
    starter = {"addr": host, "communication": {"port": free_port()}}
    (folder / "nodes.json").write_text(json.dumps({"nodes": {"starter": starter, "finisher": finisher}}))
    with Engine(checkpoint, nodes_config=folder / "nodes.json", wait_s=1.0) as engine:
        return engine.chat(QUESTION, PARAMS).text


@pytest.mark.parametrize("side", ["mdi.node.server", "mdi.cluster.node_client"], ids=["node", "server"])
def test_the_next_version_joins_this_one_if_it_understands_it(
    side: str, checkpoint: Path, settings: NodeSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{side}.HERE", Protocol(NEXT, HERE.oldest))
    with Engine(checkpoint) as engine:
        alone = engine.chat(QUESTION, PARAMS).text
    with node_here(settings) as address:
        assert ask(checkpoint, address, tmp_path) == alone


@pytest.mark.parametrize(
    ("side", "upgraded"), [("mdi.node.server", "server"), ("mdi.cluster.node_client", "node")], ids=["node", "server"]
)
def test_else_the_server_says_which_side_to_upgrade(
    side: str,
    upgraded: str,
    checkpoint: Path,
    settings: NodeSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(f"{side}.HERE", Protocol(NEXT, NEXT))
    said = f"finisher: .*the node there is of .* version of mdi .*: upgrade mdi on the {upgraded}'s machine"
    with node_here(settings) as address, pytest.raises(LinkError, match=said):
        ask(checkpoint, address, tmp_path)


@pytest.mark.parametrize(("version", "upgraded"), [(HERE.oldest - 1, "server"), (NEXT, "node")])
def test_a_node_says_so_to_a_server_that_does_not_ask(
    version: int, upgraded: str, checkpoint: Path, settings: NodeSettings
) -> None:
    manifest = Manifest.read(checkpoint / "chunks" / "2nodes").model_dump_json()
    offer = node_pb2.OfferRequest(version=version, manifest=manifest, role="finisher")
    with node_here(settings) as address:
        [offered] = call_node(address, "finisher", None, "Offer", offer)
        [configured] = call_node(
            address, "finisher", None, "Configure", node_pb2.ConfigureRequest(version=version, epoch=1)
        )
    for reply in (offered, configured):
        assert str(getattr(reply, "error", "")).endswith(f"upgrade mdi on the {upgraded}'s machine")


def test_ranks_of_a_group_are_all_of_one_version(settings: NodeSettings) -> None:
    group = [node_pb2.GroupMember(), node_pb2.GroupMember()]
    request = node_pb2.ConfigureRequest(version=NEXT, oldest_version=HERE.oldest, epoch=1, group=group)
    with node_here(settings) as address:
        [reply] = call_node(address, "finisher", None, "Configure", request)
    assert "upgrade mdi on the node's machine" in str(getattr(reply, "error", ""))
