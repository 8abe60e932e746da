"""How much of a long prompt goes into one batch while others wait for their next token. Pure: it is told the time."""

from __future__ import annotations

PAUSE_S = 0.5
"""Longest that prompts should make running streams wait for a token."""

FEWEST = 32  # tokens of prompts in a batch: fewer take hardly less time


class PrefillBudget:
    """Learns from one stage's batches. most: tokens in a batch when nobody waits. n_nodes: stages like this one."""

    def __init__(self, most: int, n_nodes: int) -> None:
        self._most = most
        self._pause_s = PAUSE_S / n_nodes
        self.tokens = min(FEWEST, most)

    def note(self, n_tokens: int, seconds: float) -> None:
        """A batch of so many tokens took so long here."""
        if n_tokens >= min(FEWEST, self._most) and seconds > 0:
            self.tokens = max(min(FEWEST, self._most), min(self._most, int(n_tokens * self._pause_s / seconds)))
