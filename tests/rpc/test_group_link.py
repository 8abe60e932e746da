"""The links between the ranks of a group, over real sockets: all get all partial sums, and only ranks get in."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from mdi.core.batch import Batch, Copy, Deepstack, LogitAdjustment, Release, Slice, TokenSampling
from mdi.core.group import Rank
from mdi.rpc.authority import Authority
from mdi.rpc.group_join import GroupListener, Member
from mdi.rpc.group_link import GroupLink
from mdi.rpc.peer import HEADER

S = TypeVar("S")
T = TypeVar("T")
NAMES = ("starter", "secondary0", "secondary1", "finisher")
SHARES = {1: ((0, 1),), 2: ((0, 2), (2, 4)), 3: ((0, 2), (2, 3), (3, 4)), 4: ((0, 1), (1, 2), (2, 3), (3, 4))}
EPOCH, TIMEOUT_S = 7, 20.0


def ranks(*bounds: tuple[int, int]) -> list[Rank]:
    return [Rank(first, last, bounds[-1][1]) for first, last in bounds]


def on_all(items: Iterable[S], call: Callable[[S], T]) -> list[T]:
    """What the call returns for each, all at once, each in its own thread."""
    with ThreadPoolExecutor() as pool:
        return [future.result(60) for future in [pool.submit(call, item) for item in items]]


@contextmanager
def group(shares: Sequence[Rank], authority: Authority | None) -> Iterator[list[GroupLink]]:
    """The ranks of a group in this process."""
    identities = [authority.issue(name) if authority else None for name in NAMES[: len(shares)]]
    listeners = [GroupListener(identity, "127.0.0.1") if number else None for number, identity in enumerate(identities)]
    members = members_of(listeners)

    def join(index: int) -> GroupLink:
        return GroupLink.join(index, members, shares, listeners[index], identities[index], EPOCH, TIMEOUT_S)

    links = on_all(range(len(shares)), join)
    try:
        yield links
    finally:
        for link in links:
            link.close()


def members_of(listeners: Sequence[GroupListener | None]) -> list[Member]:
    return [
        Member(name, "127.0.0.1", listener.port if listener else 0)
        for name, listener in zip(NAMES, listeners, strict=False)
    ]


@pytest.fixture(params=["encrypted", "plain"])
def security(request: pytest.FixtureRequest, authority: Authority) -> Authority | None:
    return authority if request.param == "encrypted" else None


def partials_of(n_shards: int, n_rows: int, dtype: torch.dtype, width: int = 96) -> Tensor:
    torch.manual_seed(n_rows)
    return torch.randn(n_shards, n_rows, width).to(dtype)


def exchanged(link: GroupLink, whole: Tensor, *ends: int) -> Tensor:
    """What a rank has after an exchange, of which it knew only its own shards. ends: of the pieces but the last."""
    own = slice(link.rank.first_shard, link.rank.last_shard)
    partials = torch.full_like(whole, float("nan"))
    for start, end in pairwise((0, *ends, whole.shape[1])):
        partials[own, start:end] = whole[own, start:end]
        link.exchange(partials, slice(start, end))
    return partials


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bounds", [SHARES[2], SHARES[3], SHARES[4], ((0, 1), (1, 4)), ((0, 5), (5, 6), (6, 8))])
def test_every_rank_gets_the_partial_sums_of_all(bounds: tuple[tuple[int, int], ...], dtype: torch.dtype) -> None:
    with group(ranks(*bounds), None) as links:
        for n_rows in (1, 3, 40, 1):
            whole = partials_of(bounds[-1][1], n_rows, dtype)
            for found in on_all(links, partial(exchanged, whole=whole)):
                assert torch.equal(found, whole)


def test_rows_may_go_in_pieces_of_which_each_rank_has_its_own(security: Authority | None) -> None:
    whole = partials_of(4, 100, torch.bfloat16)
    ends = {0: (), 2: (1, 99), 3: (30, 60)}  # by the first shard of a rank
    with group(ranks(*SHARES[3]), security) as links:
        for found in on_all(links, lambda link: exchanged(link, whole, *ends[link.rank.first_shard])):
            assert torch.equal(found, whole)


def test_megabytes_both_ways_at_once_block_nobody(security: Authority | None) -> None:
    whole = partials_of(2, 2048, torch.float32, width=1024)  # 8 MiB a shard
    with group(ranks((0, 1), (1, 2)), security) as links:
        for found in on_all(links, lambda link: exchanged(link, whole, 512, 1024, 1536)):
            assert torch.equal(found, whole)
        traffic = links[0].traffic
        assert traffic.sent_bytes == traffic.received_bytes == whole.nbytes // 2 + 4 * HEADER.size


def a_batch(dtype: torch.dtype) -> tuple[Batch, Tensor]:
    bias = LogitAdjustment(1.1, 0.0, 0.0, bytes(19_000), b"", b"", (5,), (0.5,))
    drawn = TokenSampling(0.7, 40, 0.9, 0.0, 3, 0, 9, 2, bias, b"\1")
    slices = Slice(0, 5, 300), Slice(3, 17, 2, (drawn, drawn)), Slice(1, 0, 1, (drawn,))
    torch.manual_seed(0)
    deepstack = Deepstack(torch.arange(3, 290), torch.randn(2, 287, 64).to(dtype), first_layer=5)
    edits = (Release(3, 0), Copy(1, 2, 30_000))
    return Batch(12, slices, torch.randint(0, 10**6, (3, 303)), edits, deepstack), torch.randn(303, 64).to(dtype)


def given(link: GroupLink, batch: Batch, hidden: Tensor) -> tuple[Batch, Tensor]:
    """What a rank computes: rank 0 has it and gives it to the others."""
    if not link.rank.leads:
        return link.follow()
    link.lead(batch, hidden)
    return batch, hidden


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_others_follow_with_the_batch_that_the_first_rank_leads(
    dtype: torch.dtype, security: Authority | None
) -> None:
    batch, hidden = a_batch(dtype)
    deepstack = batch.deepstack
    assert deepstack
    with group(ranks(*SHARES[3]), security) as links:
        for got, got_hidden in on_all(links, partial(given, batch=batch, hidden=hidden)):
            assert torch.equal(got_hidden, hidden)
            assert got_hidden.dtype == dtype
            assert (got.id, got.edits, got.sampled_rows) == (batch.id, batch.edits, batch.sampled_rows)
            assert torch.equal(got.positions, batch.positions)
            assert [(part.slot, part.start, part.length) for part in got.slices] == [(0, 5, 300), (3, 17, 2), (1, 0, 1)]
            assert got.deepstack
            assert torch.equal(got.deepstack.rows, deepstack.rows)
            assert torch.equal(got.deepstack.features, deepstack.features)
            assert got.deepstack.first_layer == 5
        assert links[0].traffic.sent_bytes < 2 * (hidden.nbytes + deepstack.features.nbytes + 19_000)


@pytest.mark.parametrize("n_rows", [1, 5, 300])
def test_the_first_rank_gathers_all_columns(n_rows: int, security: Authority | None) -> None:
    torch.manual_seed(1)
    logits, columns = torch.randn(n_rows, 1001).to(torch.bfloat16), {0: (0, 500), 2: (500, 750), 3: (750, 1001)}
    with group(ranks(*SHARES[3]), security) as links:
        whole, *others = on_all(
            links, lambda link: link.gather(logits[:, slice(*columns[link.rank.first_shard])].contiguous())
        )
        assert whole is not None
        assert torch.equal(whole, logits)
        assert others == [None, None]


def test_a_step_of_all_calls_with_ranks_that_are_slow_by_turns(security: Authority | None) -> None:
    whole = partials_of(4, 3, torch.bfloat16)
    batch, hidden = a_batch(torch.bfloat16)

    def steps(link: GroupLink) -> bool:
        equal = True
        for number in range(10):
            equal &= torch.equal(given(link, batch, hidden)[1], hidden)
            for layer in range(4):
                if (number + layer) % 3 == link.rank.first_shard % 3:
                    time.sleep(0.001)
                equal &= torch.equal(exchanged(link, whole), whole)
            link.gather(hidden)
        return equal

    with group(ranks(*SHARES[3]), security) as links:
        assert on_all(links, steps) == [True] * 3
