"""How often lost nodes are brought back. Pure: no clock and no processes; the caller passes times and names."""

from __future__ import annotations

import math
from collections import Counter

from mdi.core.config import RecoveryLimits

AFTERSHOCK_S = 10.0  # of running: what one cause breaks is noticed within this time


class LossLog:
    """Counts each node's losses in a row. All times are seconds of one clock.

    One cause may break several links, one after the other: a node that runs on and is lost again right after it is
    back counts once, the first time that this happens.
    """

    def __init__(self, limits: RecoveryLimits, now_s: float) -> None:
        self._limits = limits
        self._wired_s = now_s
        self._ran_s = math.inf  # between the last wiring and the loss after it
        self._lost: set[str] = set()  # since then
        self._in_a_row: Counter[str] = Counter()
        self._excused: set[str] = set()  # nodes whose last loss was not counted

    def wired(self, now_s: float) -> None:
        """From now on all nodes run."""
        self._wired_s = now_s
        self._lost.clear()

    def interrupted(self, now_s: float) -> None:
        """Until now all nodes ran. Where that was long enough, losses before count no more."""
        self._ran_s = now_s - self._wired_s
        if self._ran_s >= self._limits.settled_s:
            self._in_a_row.clear()
            self._excused.clear()

    def lost(self, node: str, *, ended: bool = False) -> bool:
        """Counts a loss. ended: the node's process has. Returns whether it is one too many."""
        first = node not in self._lost  # attempts to bring it back that fail are losses of their own
        self._lost.add(node)
        aftershock = first and not ended and self._in_a_row[node] > 0 and self._ran_s < AFTERSHOCK_S
        if aftershock and node not in self._excused:
            self._excused.add(node)
            return False
        self._excused.discard(node)
        self._in_a_row[node] += 1
        return self._in_a_row[node] > self._limits.max_losses
