"""How often lost nodes are brought back. Pure: no clock and no processes; the caller passes times and names."""

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
        """From now on all nodes run."""
        self._wired_s = now_s

    def interrupted(self, now_s: float) -> None:
        """Until now all nodes ran. Where that was long enough, losses before count no more."""
        if now_s - self._wired_s >= self._limits.settled_s:
            self._in_a_row.clear()

    def lost(self, node: str) -> bool:
        """Counts a loss. Returns whether it is one too many."""
        self._in_a_row[node] += 1
        return self._in_a_row[node] > self._limits.max_losses
