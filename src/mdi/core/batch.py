"""What one step of the pipeline computes: for some sequences, some tokens each, packed end to end without padding.

Knows slots and positions, nothing of requests, texts or networks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # who only describes a batch does not need torch
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Adjustment:
    """What is done to one row of logits before a draw: penalties for the tokens of `seen`, then biases.

    seen: different tokens, of prompt and answer; counts: how often each is in the answer. The penalties are those of
    `SamplingParams`. biases: added to the logits of `biased`; minus infinity forbids a token.
    """

    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seen: tuple[int, ...]
    counts: tuple[int, ...]
    biased: tuple[int, ...]
    biases: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Draw:
    """How one token is drawn. (seed, sample, position) decides the random number, whatever the batch or node.

    position: tokens of the sequence before the drawn one. sample: which of a request's n samples this is.
    top_logprobs: how many of the likeliest tokens are told with it.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    sample: int
    position: int
    top_logprobs: int = 0
    adjustment: Adjustment | None = None


@dataclass(frozen=True, slots=True)
class Slice:
    """The part of one sequence that one batch computes: `length` tokens from position `start` of the slot's KV cache.

    draw: how to sample after the slice's last token; None in the middle of a prefill.
    """

    slot: int
    start: int
    length: int
    draw: Draw | None = None

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclass(frozen=True, slots=True)
class Copy:
    """The first `length` tokens of one slot's cache into another's."""

    source: int
    target: int
    length: int


@dataclass(frozen=True, slots=True)
class Batch:
    """One step. `positions` are the rotary positions of all packed tokens: int64 [3, tokens] (t, h, w).

    copies: done first, one after the other.
    """

    id: int
    slices: tuple[Slice, ...]
    positions: Tensor
    copies: tuple[Copy, ...] = ()

    @property
    def n_tokens(self) -> int:
        return sum(part.length for part in self.slices)

    @property
    def prefills(self) -> bool:
        """Whether it computes more than the newest token of running sequences."""
        return any(part.length > 1 for part in self.slices)

    @property
    def drawn_rows(self) -> list[int]:
        """Rows of the packed batch whose logits are sampled: the last one of each slice that draws."""
        rows, end = [], 0
        for part in self.slices:
            end += part.length
            if part.draw is not None:
                rows.append(end - 1)
        return rows

    @property
    def draws(self) -> list[Draw]:
        return [part.draw for part in self.slices if part.draw is not None]


@dataclass(frozen=True, slots=True)
class Visual:
    """Encoded image or video tokens that replace the placeholders' embeddings from packed row `row` on.

    embeddings: [visual tokens, hidden_size].
    """

    row: int
    embeddings: Tensor


@dataclass(frozen=True, slots=True)
class Token:
    """A drawn token and the natural logarithm of its probability under the model, before adjustment and filters.

    top: the likeliest tokens, in falling order, and theirs.
    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Result:
    """The drawn tokens of a batch: one per slice that draws, in the slices' order."""

    batch_id: int
    tokens: tuple[Token, ...]
