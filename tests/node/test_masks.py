"""Token masks wait for their batch, and a batch waits for its token masks."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from mdi.core.batch import MASK_ELSEWHERE, Batch, Slice, TokenSampling
from mdi.core.errors import LinkError
from mdi.node import masks
from mdi.node.masks import MaskInbox

PLAIN = TokenSampling(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, sample=0, position=0)
MASKED = replace(PLAIN, token_mask=MASK_ELSEWHERE)
BATCH = Batch(
    7, (Slice(0, 0, 1, (MASKED,)), Slice(1, 0, 1, (PLAIN,)), Slice(2, 0, 3, (MASKED, MASKED))), torch.zeros(3, 5)
)


def completed(inbox: MaskInbox, *steps: Callable[[], None]) -> Future[Batch]:
    """The batch is waited for in a thread, then the steps are done."""
    with ThreadPoolExecutor(1) as pool:
        outcome = pool.submit(inbox.complete, BATCH)
        for step in steps:
            time.sleep(0.05)
            step()
    return outcome


def test_masks_that_arrived_before_the_batch_are_put_in_their_places() -> None:
    inbox = MaskInbox()
    inbox.add(8, [b"other"])
    inbox.add(7, [b"a", b"b"])
    inbox.add(7, [b"c"])
    batch = inbox.complete(BATCH)
    assert [sampling.token_mask for sampling in batch.samplings] == [b"a", None, b"b", b"c"]
    assert (batch.id, batch.positions) == (BATCH.id, BATCH.positions)


def test_a_batch_waits_until_all_of_its_masks_are_there() -> None:
    inbox = MaskInbox()
    outcome = completed(
        inbox, lambda: inbox.add(7, [b"a", b"b"]), lambda: inbox.add(8, [b"x"]), lambda: inbox.add(7, [b"c"])
    )
    assert outcome.result().token_masks == [b"a", b"b", b"c"]


def test_a_batch_without_masks_waits_for_nothing_even_when_no_masks_can_arrive() -> None:
    inbox = MaskInbox()
    inbox.close()
    batch = Batch(7, (Slice(0, 0, 1, (PLAIN,)), Slice(1, 0, 9)), torch.zeros(3, 10))
    assert inbox.complete(batch) is batch


def test_a_wait_ends_when_no_more_masks_can_arrive() -> None:
    inbox = MaskInbox()
    outcome = completed(inbox, lambda: inbox.add(7, [b"a"]), inbox.close)
    with pytest.raises(LinkError, match="1 of 3 token masks of a batch arrived"):
        outcome.result()


def test_masks_that_are_there_are_used_although_the_stream_has_ended() -> None:
    inbox = MaskInbox()
    inbox.add(7, [b"a", b"b", b"c"])
    inbox.close()
    assert inbox.complete(BATCH).token_masks == [b"a", b"b", b"c"]


def test_more_masks_than_the_batch_has_are_refused() -> None:
    inbox = MaskInbox()
    inbox.add(7, [b"a", b"b", b"c", b"d"])
    with pytest.raises(LinkError, match="4 of 3 token masks"):
        inbox.complete(BATCH)


def test_masks_that_never_arrive_are_waited_for_a_limited_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "TIMEOUT_S", 0.1)
    with pytest.raises(LinkError, match="0 of 3 token masks"):
        MaskInbox().complete(BATCH)
