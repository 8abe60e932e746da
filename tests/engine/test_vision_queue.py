"""Which image is encoded next, and where: here in parts or on the vision node, once for all requests that show it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import cast

import numpy as np
import pytest
import torch
from testing.fakes import FakeStage
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch import Tensor

from mdi.cluster.remote_encoder import Encoded, RemoteEncoder
from mdi.core.errors import LinkError
from mdi.core.sampling import SamplingParams
from mdi.engine.embedding_cache import EmbeddingCache
from mdi.engine.sequence import Request
from mdi.engine.stream import Stream
from mdi.engine.vision_queue import EncodeDone, VisionQueue
from mdi.layers.rope import Grid, MediaSpan
from mdi.media import Patches
from mdi.models.stage import Stage
from mdi.prompt.assembly import Media, Prompt


class FakeRemote:
    """A vision node that answers when the test says so."""

    def __init__(self) -> None:
        self.asked: list[tuple[Tensor, Callable[[Encoded], None]]] = []

    def encode(self, rows: Tensor, grid: Grid, arrived_s: float, done: Callable[[Encoded], None]) -> Future[Encoded]:
        self.asked.append((rows, done))
        future = Future[Encoded]()
        future.add_done_callback(lambda _: self.answer(LinkError("not wanted any more")))
        return future

    def answer(self, outcome: Encoded | None = None) -> None:
        rows, done = self.asked.pop(0)
        done(rows.sum().view(1, 1) if outcome is None else outcome)


class Setup:
    """A queue with a stage, and perhaps a vision node; outcomes of the node are taken at once."""

    def __init__(self, *, remote: bool = False) -> None:
        self.cache, self.remote = EmbeddingCache(10**6), FakeRemote()
        self.done: list[EncodeDone] = []
        node = cast(RemoteEncoder, self.remote) if remote else None
        self.queue = VisionQueue(cast(Stage, FakeStage()), self.cache, node, self._post)

    def _post(self, done: EncodeDone) -> None:
        self.done.append(done)
        self.queue.take(done)

    def add(self, *numbers: int) -> Request:
        """A request that shows these images."""
        request = Request(Stream(lambda: None), SamplingParams().resolved(SamplingParams(), 50))
        media = tuple(
            Media(MediaSpan(n, (1, 2, 2), 2), Patches(np.full((4, 1), number, np.float32), (1, 2, 2), bytes([number])))
            for n, number in enumerate(numbers)
        )
        prompt = Prompt((0,) * (len(numbers) + 1), torch.zeros(3, len(numbers) + 1), delta=0, media=media)
        request.set_prompt(prompt, Tokenizer(BPE()), frozenset(), sequence_length=64)
        self.queue.add(request)
        return request


def values(request: Request) -> list[float]:
    return [embeddings.item() for embeddings in request.embeddings]


def test_images_are_encoded_in_parts_in_order_of_arrival() -> None:
    setup = Setup()
    first, second = setup.add(1, 2), setup.add(3)
    progress = []
    while setup.queue.encode(0.0):
        progress.append((len(first.embeddings), len(second.embeddings)))
    assert progress == [(0, 0)] * 3 + [(1, 0)] * 4 + [(2, 0)] * 4 + [(2, 1)]
    assert (values(first), values(second)) == ([4.0, 8.0], [12.0])


def test_time_is_spent_on_one_image_at_most() -> None:
    setup = Setup()
    request = setup.add(1, 2)
    assert setup.queue.encode(60.0)
    assert values(request) == [4.0]


@pytest.mark.parametrize("remote", [False, True])
def test_a_request_that_ends_at_once_is_not_encoded_again(remote: bool) -> None:
    setup = Setup(remote=remote)
    request = setup.add(1)
    while setup.queue.encode(60.0):
        pass
    if remote:
        setup.remote.answer()
    assert request.encoded
    request.embeddings.clear()  # as the loop does at a request's end: here with its first token
    assert not setup.queue.encode(60.0)
    assert not setup.remote.asked


@pytest.mark.parametrize("remote", [False, True])
def test_a_known_image_waits_for_no_other(remote: bool) -> None:
    """D3: not even while the vision node is away."""
    setup = Setup(remote=remote)
    setup.cache.put(bytes([7]), torch.ones(1, 1))
    waiting, known, partly = setup.add(1), setup.add(7, 7), setup.add(7, 1)
    assert (values(waiting), values(known), values(partly)) == ([], [1.0, 1.0], [1.0])


def test_rows_of_encoded_images_are_released() -> None:
    """D12: a request that answers for long does not keep its pictures."""
    setup = Setup()
    request = setup.add(1, 2)
    request.work.keep(100)
    while setup.queue.encode(60.0):
        pass
    assert request.prompt
    assert [media.patches.rows.size for media in request.prompt.media] == [0, 0]
    assert all(sequence.prompt is request.prompt for sequence in request.sequences)
    assert request.work.memory.held_bytes == 0


@pytest.mark.parametrize("remote", [False, True])
def test_an_image_is_encoded_once_for_all_requests(remote: bool) -> None:
    setup = Setup(remote=remote)
    first, second = setup.add(1), setup.add(1, 1)
    setup.queue.encode(60.0)
    if remote:
        setup.remote.answer()
    assert not setup.queue.encode(60.0)
    assert (values(first), values(second)) == ([4.0], [4.0, 4.0])
    assert not setup.remote.asked


def test_a_cancelled_request_lets_the_next_one_in() -> None:
    setup = Setup()
    first, second = setup.add(1), setup.add(2)
    assert setup.queue.encode(0.0)
    first.cancelled = True
    setup.queue.cancel(first)
    while setup.queue.encode(0.0):
        pass
    assert (values(first), values(second)) == ([], [8.0])
    assert setup.cache.get(bytes([1])) is None


def test_the_vision_node_gets_one_image_at_a_time() -> None:
    setup = Setup(remote=True)
    first, second = setup.add(1), setup.add(2)
    for _ in range(3):
        assert not setup.queue.encode(60.0)
        assert len(setup.remote.asked) == 1
    setup.remote.answer()
    assert not setup.queue.encode(60.0)
    setup.remote.answer()
    assert (values(first), values(second)) == ([4.0], [8.0])
    assert [(done.request, done.digest) for done in setup.done] == [(first, bytes([1])), (second, bytes([2]))]


def test_the_vision_node_stops_for_a_client_that_has_left() -> None:
    """B3: and goes on with the next image."""
    setup = Setup(remote=True)
    first, second = setup.add(1), setup.add(2)
    setup.queue.encode(0.0)
    first.cancelled = True
    setup.queue.cancel(first)
    assert not setup.remote.asked
    setup.queue.encode(0.0)
    setup.remote.answer()
    assert (values(first), values(second)) == ([], [8.0])


def test_what_a_cancelled_request_wanted_is_kept_for_others() -> None:
    setup = Setup(remote=True)
    first = setup.add(1)
    setup.queue.encode(0.0)
    first.cancelled = True
    setup.remote.answer()
    assert values(first) == []
    assert setup.cache.get(bytes([1])) is not None


def test_a_failed_image_does_not_stop_the_next() -> None:
    setup = Setup(remote=True)
    first, second = setup.add(1), setup.add(2)
    setup.queue.encode(0.0)
    first.cancelled = True  # as the loop does when it fails a request
    setup.remote.answer(LinkError("the vision node is away"))
    setup.queue.encode(0.0)
    setup.remote.answer()
    assert (values(first), values(second)) == ([], [8.0])


@pytest.mark.parametrize("remote", [False, True])
def test_what_is_encoded_and_what_was_known_is_counted(remote: bool) -> None:
    """Each image of a prompt once, however often the queue looks for it."""
    setup = Setup(remote=remote)
    setup.add(1)
    setup.add(1, 1)
    while setup.queue.encode(60.0) or setup.remote.asked:
        if setup.remote.asked:
            setup.remote.answer()
    assert (setup.queue.misses, setup.queue.hits) == (1, 2)
    encoded = setup.queue.encode_s.distribution
    assert (sum(encoded.counts), encoded.total > 0) == (1, True)
