"""How long and how often lost nodes are brought back. Pure: no clock, no processes; the caller says when and who."""

from __future__ import annotations

from collections import Counter

from mdi.core.config import RecoveryLimits


class LossLog:
    """Counts each node's losses in a row. All times are seconds of one clock."""

    def __init__(self, limits: RecoveryLimits, now_s: float) -> None:
        self._limits = limits
        self._wired_s = now_s
        self._in_a_row: Counter[str] = Counter()

    def wired(self, now_s: float) -> None:
        """All nodes run."""
        self._wired_s = now_s

    def interrupted(self, now_s: float) -> None:
        """They did until now: a while of that, and what was lost before counts no more."""
        if now_s - self._wired_s >= self._limits.settled_s:
            self._in_a_row.clear()

    def lost(self, node: str) -> bool:
        """Notes a loss; whether it is one too many."""
        self._in_a_row[node] += 1
        return self._in_a_row[node] > self._limits.max_losses
