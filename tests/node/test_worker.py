"""The compute thread: batches in order, each for the epoch it arrived in, failures passed on in place of results."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mdi.core.batch import MASK_ELSEWHERE, Batch, Result, Slice, Token, TokenSampling
from mdi.core.errors import InputError
from mdi.node.worker import Epoch, Worker
from mdi.rpc import codec, node_pb2

PLAIN = TokenSampling(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, sample=0, position=0)
MASKED = replace(PLAIN, token_mask=MASK_ELSEWHERE)


@dataclass
class Spec:
    head: bool
    last_layer: int = 1


@dataclass
class FakeStage:
    """Doubles hidden states; draws a batch's number, or its masks' first bytes. Waits for `gate` before it computes."""

    spec: Spec
    error: Exception | None = None
    gate: threading.Event = field(default_factory=threading.Event)
    started: threading.Event = field(default_factory=threading.Event)

    def run(self, batch: Batch, hidden: Tensor) -> Tensor:
        self.started.set()
        assert self.gate.wait(10)
        if self.error:
            raise self.error
        return hidden * 2

    def sample(self, batch: Batch, hidden: Tensor) -> Result:
        masks = [sampling.token_mask for sampling in batch.samplings]
        tokens = (Token(batch.id if mask is None else mask[0], float(hidden[0, 0])) for mask in masks)
        return Result(batch.id, tuple(tokens))


def stage(*, head: bool, error: Exception | None = None, closed: bool = False) -> FakeStage:
    made = FakeStage(Spec(head), error)
    if not closed:
        made.gate.set()
    return made


def epoch_of(fake: FakeStage, number: int = 3) -> Epoch:
    return Epoch(number, fake, "secondary0", "starter")  # type: ignore[arg-type]


def work(number: int, sampling: TokenSampling = PLAIN) -> tuple[Batch, Tensor]:
    return Batch(number, (Slice(0, 0, 1, (sampling,)),), torch.zeros(3, 1, dtype=torch.int64)), torch.ones(1, 4)


def run(life: Callable[[Worker], Coroutine[Any, Any, None]]) -> None:
    async def whole() -> None:
        worker = Worker()
        worker.start()
        await asyncio.wait_for(life(worker), 20)
        await worker.stop()

    asyncio.run(whole())


def test_batches_are_computed_in_order_and_sent_on_by_a_stage_without_head() -> None:
    async def life(worker: Worker) -> None:
        epoch = worker.epoch = epoch_of(stage(head=False))
        decoder = codec.BatchDecoder(4, torch.float32)
        for number in range(5):
            worker.put(epoch, work(number))
        for number in range(5):
            piece = await epoch.outgoing.get()
            assert isinstance(piece, node_pb2.BatchPiece)
            assert piece.epoch == 3
            decoded = decoder.add(piece)
            assert decoded
            batch, hidden = decoded
            assert (batch.id, hidden.tolist()) == (number, [[2.0] * 4])

    run(life)


def test_a_stage_with_head_gives_tokens() -> None:
    async def life(worker: Worker) -> None:
        epoch = worker.epoch = epoch_of(stage(head=True))
        worker.put(epoch, work(7))
        result = await epoch.outgoing.get()
        assert result == node_pb2.BatchResult(epoch=3, batch_id=7, token_ids=[7], logprobs=[2.0])

    run(life)


def test_a_masked_batch_waits_for_its_mask_while_later_masks_arrive() -> None:
    async def life(worker: Worker) -> None:
        epoch = worker.epoch = epoch_of(stage(head=True))
        worker.put(epoch, work(7, MASKED))
        epoch.masks.add(8, [b"\x09"])
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(epoch.outgoing.get(), 0.1)
        epoch.masks.add(7, [b"\x05"])
        assert await epoch.outgoing.get() == node_pb2.BatchResult(epoch=3, batch_id=7, token_ids=[5], logprobs=[2.0])

    run(life)


@pytest.mark.parametrize(("head", "kind"), [(False, node_pb2.BatchPiece), (True, node_pb2.BatchResult)])
def test_what_cannot_be_computed_and_failures_of_earlier_nodes_are_passed_on(head: bool, kind: Any) -> None:
    async def life(worker: Worker) -> None:
        known = worker.epoch = epoch_of(stage(head=head, error=InputError("no such slot")))
        worker.put(known, work(1))
        failure = node_pb2.Failure(node="secondary0", message="no such slot")
        assert await known.outgoing.get() == kind(epoch=3, failure=failure)
        unknown = worker.epoch = epoch_of(stage(head=head, error=ValueError("a detail")), 4)
        worker.put(unknown, work(1))
        message = await unknown.outgoing.get()
        assert message
        assert "its log has the details" in message.failure.message
        earlier = node_pb2.Failure(node="secondary7", message="out of memory")
        worker.put(unknown, earlier)
        assert await unknown.outgoing.get() == kind(epoch=4, failure=earlier)

    run(life)


def test_masks_that_cannot_arrive_any_more_are_a_failure_of_the_batch() -> None:
    async def life(worker: Worker) -> None:
        epoch = worker.epoch = epoch_of(stage(head=True))
        worker.put(epoch, work(7, MASKED))
        epoch.masks.close()
        result = await epoch.outgoing.get()
        assert result
        assert result.failure.message == "0 of 1 token masks of a batch arrived"
        worker.put(epoch, work(8))
        assert (await epoch.outgoing.get()).batch_id == 8  # type: ignore[union-attr]

    run(life)


def test_what_an_epoch_left_behind_is_dropped_and_its_waits_end() -> None:
    async def life(worker: Worker) -> None:
        slow = stage(head=True, closed=True)
        old = worker.epoch = epoch_of(slow)
        worker.put(old, work(1, MASKED))
        worker.put(old, work(2))
        await asyncio.to_thread(slow.started.wait, 10)
        await worker.end_epoch()
        new = worker.epoch = epoch_of(stage(head=True), 4)
        worker.put(new, work(3))
        slow.gate.set()
        assert (await new.outgoing.get()).batch_id == 3  # type: ignore[union-attr]
        assert await old.outgoing.get() is None
        await asyncio.sleep(0.05)
        left = [old.outgoing.get_nowait() for _ in range(old.outgoing.qsize())]
        assert [bool(message and message.failure.message) for message in left] == [True]  # of batch 1; 2 was dropped

    run(life)
