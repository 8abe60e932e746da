"""A rank of three, over real sockets, when another one is lost."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch import Tensor

from mdi.core.batch import Batch, Slice
from mdi.core.errors import LinkError
from mdi.core.group import Group, Rank
from mdi.models.stage import Stage
from mdi.node.membership import Membership
from mdi.node.worker import Epoch
from mdi.rpc import node_pb2
from mdi.rpc.group_join import LinkListener, Member
from mdi.rpc.group_link import GroupLink
from mdi.rpc.traffic import Traffic

HOST, EPOCH, TIMEOUT_S = "127.0.0.1", 7, 20.0
SHARES = [Rank(index, index + 1, 3) for index in range(3)]
BATCH = Batch(0, (Slice(0, 0, 1),), torch.zeros(3, 1, dtype=torch.int64))


class ExchangingStage:
    """Of `Stage` what a rank uses: its layers are one exchange, in two pieces."""

    spec = SimpleNamespace(head=False)

    def __init__(self) -> None:
        self.group: Group | None = None

    def run(self, _batch: Batch, hidden: Tensor) -> Tensor:
        assert self.group
        partials = torch.zeros(3, 2, 8)
        self.group.send(partials, slice(0, 1))
        self.group.send(partials, slice(1, 2))
        self.group.receive(partials, 2)
        return hidden


def membership(members: Sequence[Member]) -> Membership:
    """That of the second rank."""
    group = [
        node_pb2.GroupMember(
            node=member.id,
            host=member.address,
            port=member.port,
            first_shard=rank.first_shard,
            last_shard=rank.last_shard,
        )
        for member, rank in zip(members, SHARES, strict=True)
    ]
    request = node_pb2.ConfigureRequest(epoch=EPOCH, group=group, rank=1)
    return Membership(request, SHARES[1], (HOST, 0), None, Traffic())


def test_a_rank_that_lost_another_is_not_taken_for_lost_itself() -> None:
    with LinkListener(None, HOST) as last_listener, ThreadPoolExecutor() as pool:
        last = Member("secondary1", HOST, last_listener.port)
        second = membership([Member("starter"), Member("secondary0"), last])
        members = [Member("starter"), Member("secondary0", HOST, second.port), last]
        stage = ExchangingStage()
        epoch = Epoch(EPOCH, cast("Stage", stage), "secondary0", "starter")
        outcome = pool.submit(epoch.outcome, second)
        third = pool.submit(GroupLink.join, 2, members, SHARES, last_listener, None, EPOCH, TIMEOUT_S)
        first = GroupLink.join(0, members, SHARES, None, None, EPOCH, TIMEOUT_S)
        _, to_second = third.result(TIMEOUT_S)._peers
        to_second.shut()  # this connection alone breaks, which the second rank notices behind its first piece
        first.lead(BATCH, torch.zeros(1, 8))
        assert outcome.result(TIMEOUT_S) == []
        assert (epoch.next_lost, epoch.lost_node) == (True, "secondary1")
        waiting = pool.submit(first.exchange, torch.zeros(3, 2, 8))
        with pytest.raises(TimeoutError):  # and no LinkError that names secondary0
            waiting.result(0.2)
        first.close("the epoch ends")
        with pytest.raises(LinkError, match="the epoch ends"):
            waiting.result(TIMEOUT_S)
        third.result().close()
        second.close()
