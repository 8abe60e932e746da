"""As few shards as suit the groups, and the slowest rank no slower than it must be."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from testing.checkpoints import tiny_config

from mdi.checkpoint.published import QWEN2_VL_2B
from mdi.core.group import Rank
from mdi.core.quantization import UNQUANTIZED, ModelQuantization
from mdi.models.registry import read_config
from mdi.planning.groups import group_ranks, most_shards, share_out
from mdi.planning.hardware import Machine

FULL_SIZE = read_config(QWEN2_VL_2B)
INT4, INT8 = ModelQuantization("int4"), ModelQuantization("int8")


@given(n_shards=st.integers(1, 9), speeds=st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_no_other_shares_have_a_faster_slowest_rank(n_shards: int, speeds: list[int]) -> None:
    assume(len(speeds) <= n_shards)
    ours = share_out(n_shards, speeds)
    assert (sum(ours), len(ours), min(ours) > 0) == (n_shards, len(speeds), True)
    cuts = [(0, *inner, n_shards) for inner in combinations(range(1, n_shards), len(speeds) - 1)]
    every = [[last - first for first, last in pairwise(cut)] for cut in cuts]
    assert slowest(ours, speeds) == min(slowest(shares, speeds) for shares in every)


def slowest(shares: list[int] | tuple[int, ...], speeds: list[int]) -> float:
    return max(share / speed for share, speed in zip(shares, speeds, strict=True))


@pytest.mark.parametrize(
    ("groups", "n_shards"), [((2,), 2), ((3,), 3), ((2, 2), 2), ((2, 3), 6), ((4, 2, 1), 4), ((5, 3), 5), ((7, 2), 7)]
)
def test_equal_machines_have_as_equal_shares_as_so_few_shards_allow(groups: tuple[int, ...], n_shards: int) -> None:
    ranks = group_ranks(FULL_SIZE, groups, [Machine()] * sum(groups), UNQUANTIZED)
    assert {rank.n_shards for rank in ranks if rank} == {n_shards}
    assert [rank is None for rank in ranks] == [size == 1 for size in groups for _ in range(size)]


@pytest.mark.parametrize(
    ("speeds", "shares"),
    [((10, 10.2), (1, 1)), ((10, 20), (1, 2)), ((30, 10), (3, 1)), ((10, 15), (2, 3)), ((1, 100), (1, 7))],
)
def test_a_faster_machine_has_more_shards(speeds: tuple[float, ...], shares: tuple[int, ...]) -> None:
    first, last = group_ranks(FULL_SIZE, (2,), [Machine(speed) for speed in speeds], INT4)
    assert first == Rank(0, shares[0], sum(shares))
    assert last == Rank(shares[0], sum(shares), sum(shares))


def test_shards_that_are_given_are_shared_out() -> None:
    first, last, *_ = group_ranks(FULL_SIZE, (2, 1), [Machine(1), Machine(2), Machine(1)], INT8, shards=12)
    assert (first, last) == (Rank(0, 4, 12), Rank(4, 12, 12))


def test_groups_of_quantised_inputs_stay_whole() -> None:
    tiny = read_config(tiny_config())  # four heads of 16
    assert [most_shards(tiny, formats) for formats in (UNQUANTIZED, INT4, INT8)] == [4, 2, 1]
    assert most_shards(FULL_SIZE, INT8) == 8
