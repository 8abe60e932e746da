"""The number of prompt tokens in one batch while other sequences wait for their next token. Pure, without a clock."""

from __future__ import annotations

PAUSE_S = 0.5
"""Longest time that prompts should make running streams wait for a token."""

MIN_TOKENS = 32  # tokens of prompts in a batch: fewer take hardly less time


class PrefillBudget:
    """Learns from the batches of one stage. limit: tokens in a batch when nothing decodes. n_nodes: stages alike."""

    def __init__(self, limit: int, n_nodes: int) -> None:
        self._limit = limit
        self._least = min(MIN_TOKENS, limit)
        self._pause_s = PAUSE_S / n_nodes
        self.tokens = self._least

    def observe(self, n_tokens: int, seconds: float) -> None:
        """Adapts `tokens` to a batch of n_tokens that took this long; small batches change nothing."""
        if n_tokens >= self._least and seconds > 0:
            self.tokens = max(self._least, min(self._limit, int(n_tokens * self._pause_s / seconds)))
