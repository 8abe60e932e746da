"""When lost nodes are given up: limits and counts, without clocks or processes."""

from __future__ import annotations

import math

import pytest

from mdi.cluster.recovery import LossLog
from mdi.core.config import RecoveryLimits
from mdi.core.errors import ConfigError

LIMITS = RecoveryLimits(max_losses=2, settled_s=60)


def test_a_node_lost_too_often_in_a_row_is_given_up() -> None:
    log = LossLog(LIMITS, now_s=0)
    assert [log.lost("finisher") for _ in range(4)] == [False, False, True, True]


def test_nodes_are_counted_apart() -> None:
    log = LossLog(LIMITS, now_s=0)
    assert not any(log.lost(name) for name in ("secondary0", "finisher") * 2)
    assert log.lost("secondary0")


@pytest.mark.parametrize(("ran_s", "forgotten"), [(59.9, False), (60, True)])
def test_losses_count_in_a_row_only_until_all_have_run_for_a_while(ran_s: float, forgotten: bool) -> None:
    log = LossLog(LIMITS, now_s=0)
    log.lost("finisher")
    log.lost("finisher")
    log.wired(100)
    log.interrupted(100 + ran_s)
    assert log.lost("finisher") is not forgotten


def test_time_spent_bringing_nodes_back_is_not_time_they_ran() -> None:
    log = LossLog(LIMITS, now_s=0)
    for wired_s in (100, 200, 300):
        log.interrupted(wired_s - 90)  # a recovery of 90 s, then 10 s of running
        given_up = log.lost("finisher")
        log.wired(wired_s)
    assert given_up


def test_a_node_that_runs_on_and_is_lost_again_right_after_it_is_back_counts_once() -> None:
    """D14: one freeze may break several links, one after the other."""
    log = LossLog(LIMITS, now_s=0)
    counted = []
    for wired_s in (100, 101, 102, 103, 104):
        log.wired(wired_s)
        log.interrupted(wired_s + 0.5)
        counted.append(log.lost("finisher"))
    assert counted == [False, False, False, False, True]  # the third that counts is one too many


def test_a_process_that_ends_again_and_again_is_no_aftershock() -> None:
    log = LossLog(LIMITS, now_s=0)
    given_up = []
    for wired_s in (100, 101, 102):
        log.wired(wired_s)
        log.interrupted(wired_s + 0.5)
        given_up.append(log.lost("finisher", ended=True))
    assert given_up == [False, False, True]


@pytest.mark.parametrize(
    ("limits", "message"),
    [({"recovery_timeout_s": 0}, "above 0"), ({"recovery_timeout_s": math.nan}, "nan"), ({"max_losses": -1}, "-1")],
)
def test_limits_that_make_no_sense_are_refused(limits: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RecoveryLimits(**limits)  # type: ignore[arg-type]
