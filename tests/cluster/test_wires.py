"""Who talks to whom, for every way to divide a few nodes into stages."""

from __future__ import annotations

from itertools import product

import pytest

from mdi.cluster.wires import Wires
from mdi.core.group import Rank


def ranks_of(*groups: int) -> list[Rank | None]:
    return [Rank(rank, rank + 1, size) if size > 1 else None for size in groups for rank in range(size)]


def all_groups() -> list[tuple[int, ...]]:
    return [groups for stages in range(1, 4) for groups in product(range(1, 4), repeat=stages)]


@pytest.mark.parametrize("groups", all_groups(), ids=str)
def test_leaders_are_a_chain_and_the_others_hang_on_none(groups: tuple[int, ...]) -> None:
    wires = Wires.of(ranks_of(*groups))
    assert [len(stage) for stage in wires.stages] == list(groups)
    assert [node for stage in wires.stages for node in stage] == list(range(sum(groups)))
    leaders = [stage.start for stage in wires.stages]
    assert leaders[0] == 0
    assert leaders[-1] == wires.head
    for node in range(sum(groups)):
        stage = wires.stage(node)
        assert node in stage
        if node not in leaders:
            assert wires.next(node) is wires.previous(node) is None
            continue
        place = leaders.index(node)
        assert wires.next(node) == (leaders[place + 1] if place + 1 < len(leaders) else None)
        assert wires.previous(node) == (leaders[place - 1] if place else None)


def test_unequal_shares_of_a_group_are_one_stage() -> None:
    assert Wires.of([Rank(0, 3, 4), Rank(3, 4, 4), None]).stages == (range(2), range(2, 3))
