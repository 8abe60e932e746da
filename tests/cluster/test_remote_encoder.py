"""A vision node beside the pipeline: real processes, the answers of one engine, and what happens when it is gone."""

from __future__ import annotations

import io
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from testing.checkpoints import tiny_config, tiny_text_config
from testing.manual_cluster import NODES, ManualCluster, on_loopback
from testing.processes import Process
from testing.videos import encoded, numbered
from testing.waiting import wait_for

from mdi import Engine, SamplingParams
from mdi.checkpoint.random_weights import write_random_checkpoint
from mdi.core.errors import ConfigError, LinkError
from mdi.core.status import NodeStatus

GREEDY = SamplingParams(temperature=0, max_tokens=12)
SHORT_S = 5.0
N_IMAGES = 20  # more than there are slots


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a vision tower so deep that an image takes a while."""
    return write_random_checkpoint(tmp_path_factory.mktemp("vision") / "tiny", tiny_config(vision_config={"depth": 48}))


@pytest.fixture(scope="module")
def alone(checkpoint: Path) -> Iterator[Engine]:
    with Engine(checkpoint, dtype="float32", sequence_length=1024) as engine:
        yield engine


class Served:
    """An engine over manual nodes, one of which has the vision tower."""

    def __init__(self, checkpoint: Path, nodes: ManualCluster, undo: ExitStack) -> None:
        self.nodes = nodes
        nodes.start_all()
        self.engine = undo.enter_context(
            Engine(
                checkpoint,
                nodes_config=nodes.config,
                wait_s=100,
                certs=nodes.certs("starter"),
                encryption=nodes.encrypted,
                dtype="float32",
                sequence_length=1024,
                vision_cache_bytes=0,
                recovery_timeout_s=60,
            )
        )

    @property
    def vision(self) -> Process:
        return self.nodes.process("vision")

    @property
    def status(self) -> NodeStatus:
        return next(node for node in self.engine.nodes() if node.name == "vision")

    def end_vision(self) -> None:
        self.vision.kill()

    def start_vision(self) -> None:
        self.nodes.start("vision")


@pytest.fixture(scope="module")
def served(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with ExitStack() as undo:
        places = on_loopback(*NODES, "vision")
        nodes = undo.enter_context(ManualCluster(tmp_path_factory.mktemp("served"), places, encrypted=True))
        yield Served(checkpoint, nodes, undo)


def about(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "What is it?"}]}]


def image(seed: int, side: int = 112) -> dict[str, Any]:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return {"type": "image", "image": buffer.getvalue()}


def test_images_and_videos_are_encoded_elsewhere_with_the_same_answers(served: Served, alone: Engine) -> None:
    film = {"type": "video", "video": encoded(numbered(30), fps=10)}
    for messages in (about(image(1)), about(image(2), image(3)), about(film), "No image at all."):
        ours = served.engine.chat(messages, GREEDY)
        assert ours.token_ids == alone.chat(messages, GREEDY).token_ids
        assert ours.logprobs == pytest.approx(alone.chat(messages, GREEDY).logprobs, abs=1e-4)


def test_the_starter_has_no_vision_weights(served: Served) -> None:
    stage = served.engine._cluster.stage
    assert stage._vision is None
    assert not stage.spec.vision
    assert [node.name for node in served.engine.nodes()] == ["starter", *NODES, "vision"]


def test_the_node_is_shown(served: Served) -> None:
    served.engine.chat(about(image(4)), GREEDY)
    wait_for(lambda: served.status.received_bytes > 10_000)
    assert served.status.state == "ready"
    assert (served.status.dtype, served.status.device) == ("float32", "cpu")
    assert served.status.sent_bytes > 1_000


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "frozen"])
def test_an_image_is_encoded_again_when_its_node_comes_back(served: Served, alone: Engine, how: str) -> None:
    question = about(image(5, side=840))
    losses = served.status.restarts
    stream = served.engine.submit(question, GREEDY)
    wait_for(lambda: served.engine._loop._vision._remote_work)
    if how == "killed":
        served.end_vision()
        text = served.engine.chat("A word meanwhile.", GREEDY)
        served.start_vision()
    else:
        served.vision.popen.send_signal(signal.SIGSTOP)
        text = served.engine.chat("A word meanwhile.", GREEDY)
        wait_for(lambda: served.status.restarts > losses)
        served.vision.popen.send_signal(signal.SIGCONT)
    assert text.token_ids == alone.chat("A word meanwhile.", GREEDY).token_ids
    assert stream.completion().token_ids == alone.chat(question, GREEDY).token_ids
    assert served.status.restarts > losses


@pytest.mark.slow
def test_images_fail_alone_when_their_node_does_not_come_back(
    served: Served, alone: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert served.engine._cluster.encoder
    monkeypatch.setattr(served.engine._cluster.encoder, "_timeout_s", SHORT_S)
    served.end_vision()
    wait_for(lambda: served.status.state == "lost")
    failed = served.engine.recovery.failed_requests
    started_s = time.monotonic()
    streams = [served.engine.submit(about(image(100 + number)), GREEDY) for number in range(N_IMAGES)]
    assert served.engine.chat("A word.", GREEDY).token_ids == alone.chat("A word.", GREEDY).token_ids
    for stream in streams:
        with pytest.raises(LinkError, match=r"not encoded within 5 s: vision: nothing listens at .*: start the node"):
            list(stream)
    assert time.monotonic() - started_s < N_IMAGES * SHORT_S / 2  # together, not one after the other
    assert served.engine.recovery.failed_requests == failed + N_IMAGES
    served.start_vision()
    monkeypatch.undo()
    assert served.engine.chat(about(image(6)), GREEDY).token_ids == alone.chat(about(image(6)), GREEDY).token_ids


def test_a_request_can_be_cancelled_while_its_image_waits(served: Served) -> None:
    served.end_vision()
    stream = served.engine.submit(about(image(7)), GREEDY)
    time.sleep(0.3)
    stream.cancel()
    assert list(stream) == []
    served.start_vision()
    assert served.engine.chat(about(image(8)), GREEDY).token_ids


def test_a_starter_alone_can_have_a_vision_node(checkpoint: Path, alone: Engine, tmp_path: Path) -> None:
    with ExitStack() as undo:
        nodes = undo.enter_context(ManualCluster(tmp_path, on_loopback("vision")))
        engine = Served(checkpoint, nodes, undo).engine
        assert [node.name for node in engine.nodes()] == ["starter", "vision"]
        assert engine.chat(about(image(9)), GREEDY).token_ids == alone.chat(about(image(9)), GREEDY).token_ids


def test_a_text_model_needs_none(tmp_path: Path) -> None:
    path = write_random_checkpoint(tmp_path / "text", tiny_text_config())
    with ExitStack() as undo:
        nodes = undo.enter_context(ManualCluster(tmp_path, on_loopback("vision")))
        with pytest.raises(ConfigError, match="no vision tower for a node of its own: leave the vision node out"):
            Served(path, nodes, undo)
