"""Real node processes on real sockets, spoken to as a starter does."""

from __future__ import annotations

import asyncio
import os
import queue
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import grpc
import pytest
import torch
from testing.links import RecordingProxy, call_node
from testing.local_link import LocalLink
from testing.nodes import node_here
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
from mdi.core.errors import LinkError
from mdi.models.stage import Stage
from mdi.node import masks
from mdi.node.settings import NodeSettings
from mdi.rpc import codec, node_pb2
from mdi.rpc.authority import Authority
from mdi.rpc.callers import SERVICE
from mdi.rpc.channel import CHANNEL_OPTIONS, HEARTBEAT_S, MISSED_BEATS, open_channel
from mdi.rpc.traffic import node_stub
from mdi.rpc.version import HERE

Inbox = queue.SimpleQueue[Delivery]
pytestmark = pytest.mark.usefixtures("no_process_left")
LENGTH = 128
GREEDY = TokenSampling(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, sample=0, position=0)


@pytest.fixture
def nodes_here(chunks: list[Path]) -> Iterator[list[NodeAddress]]:
    """Two real nodes in this process."""
    with ExitStack() as undo:
        yield [
            NodeAddress(name, undo.enter_context(node_here(NodeSettings(name, chunk, listen=""))))
            for name, chunk in zip(("secondary0", "finisher"), chunks[1:], strict=True)
        ]


@pytest.fixture
def launcher(chunks: list[Path]) -> Iterator[LocalLauncher]:
    launcher = LocalLauncher(chunks[1:], dtype="float32", device="cpu", threads=1)
    try:
        launcher.start()
        yield launcher
    finally:
        launcher.close()


def settings_of(chunks: list[Path], **changes: int | str) -> PipelineSettings:
    agreed = {"manifest_digest": Manifest.read(chunks[0].parent).digest, "n_slots": 4, "sequence_length": LENGTH}
    return PipelineSettings(**{**agreed, **changes})  # type: ignore[arg-type]


def stage_of(chunk: Path) -> Stage:
    return Stage(load_chunk(chunk), n_slots=4, sequence_length=LENGTH)


def batches(n_batches: int) -> Iterator[Batch]:
    """One prefill of ten tokens in every slot, then decode steps of alternating pairs of slots."""
    yield Batch(0, tuple(Slice(slot, 0, 10, (GREEDY,)) for slot in range(4)), torch.arange(10).repeat(3, 4))
    for index in range(1, n_batches):
        step = 10 + (index - 1) // 2
        pair = (0, 1) if index % 2 else (2, 3)
        yield Batch(index, tuple(Slice(slot, step, 1, (GREEDY,)) for slot in pair), torch.full((3, 2), step))


def test_batches_in_flight_come_back_in_order_with_the_tokens_of_one_process(
    chunks: list[Path], launcher: LocalLauncher
) -> None:
    first = stage_of(chunks[0])
    remote, local = Inbox(), Inbox()
    link = OwnLink(launcher.nodes, settings_of(chunks), remote.put)
    reference = LocalLink([stage_of(chunk) for chunk in chunks[1:]], local.put)
    generator = torch.Generator().manual_seed(0)
    sent = list(batches(101))
    for batch in sent:
        hidden = first.run(batch, first.embed(torch.randint(0, 256, (batch.n_tokens,), generator=generator)))
        assert isinstance(hidden, torch.Tensor)
        link.send(batch, hidden)
        reference.send(batch, hidden)
    results = [remote.get(timeout=60) for _ in sent]
    expected = [local.get() for _ in sent]
    link.close()
    assert all(isinstance(result, Result) for result in results)
    assert [result.batch_id for result in results] == [batch.id for batch in sent]  # type: ignore[union-attr]
    assert [[token.id for token in result.tokens] for result in results] == [  # type: ignore[union-attr]
        [token.id for token in result.tokens]  # type: ignore[union-attr]
        for result in expected
    ]


def masked(batch: Batch, generator: torch.Generator, *, temperature: float) -> Batch:
    """The batch with a mask of 20 kB for every other slot, which allows five of the 256 tokens."""

    def sampling(slot: int, position: int) -> TokenSampling:
        mask = bytearray(20_000)
        for token in torch.randperm(256, generator=generator)[:5].tolist():
            mask[token // 8] |= 1 << token % 8
        return replace(GREEDY, temperature=temperature, position=position, token_mask=None if slot % 2 else bytes(mask))

    slices = tuple(replace(part, samplings=(sampling(part.slot, part.end),)) for part in batch.slices)
    return replace(batch, slices=slices)


def test_direct_links_are_used_where_they_can_be_made_and_grpc_elsewhere(
    chunks: list[Path], launcher: LocalLauncher
) -> None:
    first, tokens = stage_of(chunks[0]), []
    batch = next(batches(1))
    hidden = first.run(batch, first.embed(torch.arange(40)))
    assert isinstance(hidden, torch.Tensor)
    with ExitStack() as stack:
        proxies = [stack.enter_context(closing(RecordingProxy(node.address))) for node in launcher.nodes]
        hidden_away = [
            NodeAddress(node.name, proxy.address) for node, proxy in zip(launcher.nodes, proxies, strict=True)
        ]
        for epoch, nodes in enumerate((launcher.nodes, hidden_away), start=1):
            inbox = Inbox()
            link = stack.enter_context(closing(OwnLink(nodes, settings_of(chunks, first_epoch=epoch), inbox.put)))
            assert link._epoch
            assert bool(link._epoch.direct) == bool(link._epoch._results) == (epoch == 1)
            link.send(batch, hidden)
            result = inbox.get(timeout=30)
            assert isinstance(result, Result)
            tokens.append(result.tokens)
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("temperature", [0.0, 1.2])
def test_masked_draws_on_three_nodes_are_those_of_one_and_masks_skip_the_middle(
    chunks: list[Path], nodes_here: list[NodeAddress], temperature: float
) -> None:
    first, remote, local = stage_of(chunks[0]), Inbox(), Inbox()
    link = OwnLink(nodes_here, settings_of(chunks), remote.put)
    reference = LocalLink([stage_of(chunk) for chunk in chunks[1:]], local.put)
    generator, sent = torch.Generator().manual_seed(0), 0
    for plain in batches(60):
        batch = masked(plain, generator, temperature=temperature)
        hidden = first.run(batch, first.embed(torch.randint(0, 256, (batch.n_tokens,), generator=generator)))
        link.send(batch, hidden)
        reference.send(batch, hidden)
        sent += hidden.nbytes
    for _ in range(60):
        result, expected = remote.get(timeout=60), local.get()
        assert isinstance(result, Result)
        assert isinstance(expected, Result)
        assert [token.id for token in result.tokens] == [token.id for token in expected.tokens]
    assert link.traffic.sent_bytes < sent + 60 * 1000
    link.close()


def test_masks_are_of_their_epoch(chunks: list[Path], nodes_here: list[NodeAddress]) -> None:
    first, inbox = stage_of(chunks[0]), Inbox()
    link = OwnLink(nodes_here, settings_of(chunks), inbox.put)
    plain = next(batches(1))
    hidden = first.run(plain, first.embed(torch.zeros(40, dtype=torch.int64)))
    batch = replace(plain, slices=(replace(plain.slices[0], samplings=(only(7),)), *plain.slices[1:]))
    with patch.object(codec, "encode_masks", lambda *_: ()):
        link.send(batch, hidden)  # its masks never arrive: the finisher waits
    deadline = time.monotonic() + 20
    while link.status()[1].received_bytes < hidden.nbytes:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    link.unwire()
    link.wire(nodes_here, timeout_s=60)
    link.send(replace(batch, id=1), hidden)
    result = inbox.get(timeout=masks.TIMEOUT_S / 2)
    assert isinstance(result, Result)
    assert (result.batch_id, result.tokens[0].id) == (1, 7)
    assert inbox.empty()
    link.close()


def test_a_batch_whose_masks_do_not_arrive_is_a_failure_of_the_finisher(
    chunks: list[Path], nodes_here: list[NodeAddress], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masks, "TIMEOUT_S", 0.2)
    monkeypatch.setattr(codec, "encode_masks", lambda *_: ())
    first, inbox = stage_of(chunks[0]), Inbox()
    link = OwnLink(nodes_here, settings_of(chunks), inbox.put)
    plain = next(batches(1))
    hidden = first.run(plain, first.embed(torch.zeros(40, dtype=torch.int64)))
    link.send(replace(plain, slices=(replace(plain.slices[0], samplings=(only(7),)), *plain.slices[1:])), hidden)
    error = inbox.get(timeout=20)
    assert isinstance(error, LinkError)
    assert str(error) == "node finisher failed: 0 of 1 token masks of a batch arrived"
    link.close()


def only(token: int) -> TokenSampling:
    """A draw that can give this token alone."""
    mask = bytearray(32)
    mask[token // 8] |= 1 << token % 8
    return replace(GREEDY, token_mask=bytes(mask))


def test_progress_and_status_tell_what_every_node_holds(chunks: list[Path], launcher: LocalLauncher) -> None:
    seen: dict[str, tuple[int, int]] = {}
    link = OwnLink(
        launcher.nodes, settings_of(chunks), Inbox().put, progress=lambda node, *done: seen.update({node: done})
    )
    nodes = link.status()
    link.close()
    assert {name: done == total > 0 for name, (done, total) in seen.items()} == {"secondary0": True, "finisher": True}
    assert [(node.name, node.first_layer, node.last_layer) for node in nodes] == [
        ("secondary0", 2, 4),
        ("finisher", 4, 6),
    ]
    assert all(node.resident_bytes > 10**7 for node in nodes)


def test_nodes_of_another_plan_are_refused_by_name(chunks: list[Path], launcher: LocalLauncher) -> None:
    with pytest.raises(LinkError, match=r"finisher.*another plan.*mdi prepare"):
        OwnLink(launcher.nodes, settings_of(chunks, manifest_digest="other"), Inbox().put)


def test_a_batch_that_a_node_cannot_compute_is_reported_and_the_node_lives(
    chunks: list[Path], launcher: LocalLauncher
) -> None:
    first, inbox = stage_of(chunks[0]), Inbox()
    link = OwnLink(launcher.nodes, settings_of(chunks), inbox.put)
    good = next(batches(1))
    hidden = first.run(good, first.embed(torch.zeros(40, dtype=torch.int64)))
    assert isinstance(hidden, torch.Tensor)
    link.send(Batch(5, (Slice(99, 0, 40, (GREEDY,)),), good.positions), hidden)  # there is no slot 99
    error = inbox.get(timeout=30)
    assert isinstance(error, LinkError)
    assert "secondary0" in str(error)
    link.send(good, hidden)
    assert isinstance(inbox.get(timeout=30), Result)
    link.close()


def test_batches_of_an_old_epoch_are_dropped(chunks: list[Path], launcher: LocalLauncher) -> None:
    first, old_inbox, inbox = stage_of(chunks[0]), Inbox(), Inbox()
    batch = next(batches(1))
    hidden = first.run(batch, first.embed(torch.zeros(40, dtype=torch.int64)))
    assert isinstance(hidden, torch.Tensor)
    old = OwnLink(launcher.nodes, settings_of(chunks), old_inbox.put)
    link = OwnLink(launcher.nodes, settings_of(chunks, first_epoch=2), inbox.put)
    old.send(batch, hidden)
    link.send(Batch(77, batch.slices, batch.positions), hidden)
    result = inbox.get(timeout=30)
    assert isinstance(result, Result)
    assert result.batch_id == 77
    with pytest.raises(queue.Empty):
        inbox.get(timeout=0.3)
    old.close()
    link.close()


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_killed_node_is_noticed_on_the_links_and_by_who_started_it(chunks: list[Path], victim: int) -> None:
    inbox, deaths = Inbox(), Inbox()
    four_nodes = prepare(open_source(chunks[0].parents[2]), 4)
    names = ["secondary0", "secondary1", "finisher"]
    launcher = LocalLauncher(
        [four_nodes / f"model_{name}.safetensors" for name in names], dtype="float32", device="cpu", threads=1
    )
    launcher.start()
    try:
        launcher.watch(deaths.put)
        link = OwnLink(launcher.nodes, settings_of([four_nodes / "x"]), inbox.put)
        os.kill(link.status()[victim].pid, signal.SIGKILL)
        death, loss = deaths.get(timeout=10), inbox.get(timeout=10)
        link.close()
        assert isinstance(death, LinkError)
        assert isinstance(loss, LinkError)
        assert death.node == loss.node == names[victim]
        assert "-9" in str(death)
        assert launcher.dead() == {names[victim]}
    finally:
        launcher.close()


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_frozen_node_is_noticed(chunks: list[Path], launcher: LocalLauncher, victim: int) -> None:
    inbox = Inbox()
    link = OwnLink(launcher.nodes, settings_of(chunks), inbox.put)
    os.kill(link.status()[victim].pid, signal.SIGSTOP)
    started = time.monotonic()
    loss = inbox.get(timeout=20)
    assert time.monotonic() - started > 2
    assert isinstance(loss, LinkError)
    assert loss.node == launcher.nodes[victim].name
    link.close()
    launcher.restart([loss.node], timeout_s=60)
    assert launcher.dead() == set()


def test_a_node_busy_for_longer_than_the_silence_allowed_is_not_lost(
    chunks: list[Path], launcher: LocalLauncher
) -> None:
    n_tokens = 24_000
    inbox = Inbox()
    link = OwnLink(launcher.nodes, settings_of(chunks, sequence_length=n_tokens), inbox.put)
    batch = Batch(0, (Slice(0, 0, n_tokens, (GREEDY,)),), torch.arange(n_tokens).repeat(3, 1))
    started = time.monotonic()
    link.send(batch, torch.randn(n_tokens, 64))
    assert isinstance(inbox.get(timeout=200), Result)
    assert time.monotonic() - started > MISSED_BEATS * HEARTBEAT_S
    busiest = max(node.busy_share for node in link.status())
    link.close()
    assert busiest > 0.1


def test_what_is_in_flight_in_an_old_epoch_touches_nothing_of_the_next(
    chunks: list[Path], launcher: LocalLauncher
) -> None:
    first, remote, local = stage_of(chunks[0]), Inbox(), Inbox()
    link = OwnLink(launcher.nodes, settings_of(chunks), remote.put)
    reference = LocalLink([stage_of(chunk) for chunk in chunks[1:]], local.put)
    generator = torch.Generator().manual_seed(0)
    for index in range(40):  # long enough to be computed when the wires are pulled
        old = Batch(index, tuple(Slice(slot, 0, 100, (GREEDY,)) for slot in range(4)), torch.arange(100).repeat(3, 4))
        link.send(old, torch.randn(400, 64, generator=generator))
    link.unwire()
    link.wire(launcher.nodes, timeout_s=60)
    while not remote.empty():
        remote.get()
    for batch in batches(30):
        hidden = first.run(batch, first.embed(torch.randint(0, 256, (batch.n_tokens,), generator=generator)))
        assert isinstance(hidden, torch.Tensor)
        link.send(Batch(100 + batch.id, batch.slices, batch.positions), hidden)
        reference.send(batch, hidden)
    for index in range(30):
        result, expected = remote.get(timeout=60), local.get()
        assert isinstance(result, Result)
        assert isinstance(expected, Result)
        assert result.batch_id == 100 + index
        assert [token.id for token in result.tokens] == [token.id for token in expected.tokens]
    assert remote.empty()
    link.close()


def test_nodes_tell_how_busy_they_are_and_what_their_links_carry(chunks: list[Path], launcher: LocalLauncher) -> None:
    first, inbox = stage_of(chunks[0]), Inbox()
    link = OwnLink(launcher.nodes, settings_of(chunks), inbox.put)
    batch = next(batches(1))
    hidden = first.run(batch, first.embed(torch.zeros(40, dtype=torch.int64)))
    assert isinstance(hidden, torch.Tensor)
    link.send(batch, hidden)
    inbox.get(timeout=30)
    deadline = time.monotonic() + 20
    while not all(node.sent_bytes for node in link.status()):  # until the next heartbeats
        assert time.monotonic() < deadline
        time.sleep(0.05)
    secondary, finisher = link.status()
    link.close()
    assert {secondary.state, finisher.state} == {"ready"}
    assert link.traffic.sent_bytes > hidden.nbytes
    assert secondary.sent_bytes > hidden.nbytes
    assert finisher.received_bytes == secondary.sent_bytes
    assert link.traffic.received_bytes == finisher.sent_bytes
    assert secondary.round_trip_s
    assert secondary.round_trip_s > 0


def test_closing_a_link_ends_a_wait_for_a_node_that_never_loads(chunks: list[Path], launcher: LocalLauncher) -> None:
    link = OwnLink(launcher.nodes, settings_of(chunks), Inbox().put)
    os.kill(link.status()[0].pid, signal.SIGSTOP)
    link.unwire()
    with ThreadPoolExecutor(1) as pool:
        wiring = pool.submit(link.wire, launcher.nodes, 60)
        time.sleep(0.3)
        started = time.monotonic()
        link.close()
        assert time.monotonic() - started < 4
        with pytest.raises(LinkError, match="closed"):
            wiring.result()
    with pytest.raises(LinkError, match="closed"):
        link.wire(launcher.nodes, 60)


def test_a_node_that_is_not_there_is_named() -> None:
    settings = PipelineSettings("", n_slots=1, sequence_length=8)
    with pytest.raises(LinkError, match="node finisher does not answer"):
        OwnLink([NodeAddress("finisher", "127.0.0.1:9")], settings, Inbox().put)


def test_a_corrupted_chunk_reaches_who_connects(chunks: list[Path], tmp_path: Path) -> None:
    folder = shutil.copytree(chunks[0].parent, tmp_path / "3nodes")
    damaged = folder / chunks[2].name
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    launcher = LocalLauncher([folder / chunks[1].name, damaged], dtype="float32", device="cpu", threads=1)
    launcher.start()
    try:
        with pytest.raises(LinkError, match=r"finisher.*model_finisher.*mdi prepare"):
            OwnLink(launcher.nodes, settings_of(chunks), Inbox().put)
    finally:
        launcher.close()


CALLERS = ("starter", "secondary0", "secondary1", "finisher", "vision", "spare0", "spare1")


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority.create()


@pytest.fixture(scope="module")
def configured(chunks: list[Path], authority: Authority) -> Iterator[str]:
    """The address of a real node with encryption that has spare0 before it."""
    settings = NodeSettings("finisher", chunks[2], listen="", dtype="float32", identity=authority.issue("finisher"))
    starter = authority.issue("starter")
    request = node_pb2.ConfigureRequest(
        version=HERE.version,
        epoch=5,
        manifest_digest=Manifest.read(chunks[2].parent).digest,
        n_slots=1,
        sequence_length=8,
        shards=1,
        previous_node="spare0",
    )
    with node_here(settings) as address:
        deadline = time.monotonic() + 30
        while call_node(address, "finisher", starter, "Configure", request)[0].error:  # type: ignore[attr-defined]
            assert time.monotonic() < deadline
        yield address


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize("method", [method.name for method in SERVICE.methods])
def test_a_real_node_answers_a_method_only_to_the_node_that_may_call_it(
    method: str, caller: str, configured: str, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    identity = authority.issue(caller)
    if caller == ("spare0" if method == "Batches" else "starter"):
        call_node(configured, "finisher", identity, method)
        assert not [record for record in caplog.records if "refused" in record.getMessage()]
        return
    with pytest.raises(grpc.aio.AioRpcError) as error:
        call_node(configured, "finisher", identity, method)
    assert error.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert f"refused node {caller} at" in caplog.text


def test_bytes_of_another_version_are_named_and_the_node_lives(configured: str, authority: Authority) -> None:
    async def run() -> None:
        async with open_channel(configured, "finisher", authority.issue("starter"), CHANNEL_OPTIONS) as channel:
            masks = await channel.stream_unary("/mdi.Node/TokenMasks")(iter([b"\xff\xff"]), timeout=10)
            encoded = [reply async for reply in channel.stream_stream("/mdi.Node/Encode")(iter([b"\xff"]), timeout=10)]
            for reply in (masks, *encoded):
                assert b"bytes arrived that are no message of this version of mdi" in reply
            with pytest.raises(grpc.aio.AioRpcError):
                await channel.unary_unary("/mdi.Node/Configure")(b"\xff\xff", timeout=10)
            assert (await node_stub(channel).Status(node_pb2.StatusRequest(), timeout=10)).epoch == 5

    asyncio.run(run())
