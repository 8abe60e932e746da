"""How long and how often lost nodes are brought back. Pure: no clock, no processes; the caller says when and who."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from mdi.core.errors import ConfigError


@dataclass(frozen=True)
class RecoveryLimits:
    """When to give up. Raises ConfigError for limits that make no sense.

    timeout_s: longest wait of running requests for nodes that were lost.
    max_losses: of one node in a row, each within `settled_s` of running.
    """

    timeout_s: float = 120.0
    max_losses: int = 5
    settled_s: float = 60.0

    def __post_init__(self) -> None:
        if not self.timeout_s > 0:
            raise ConfigError(f"the recovery timeout must be longer than 0 s, got {self.timeout_s:g}")
        if self.max_losses < 0:
            raise ConfigError(f"nodes can be lost 0 times or more before it is given up, got {self.max_losses}")


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
