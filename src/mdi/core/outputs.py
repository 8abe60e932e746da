"""What a request gives back: pieces while it runs, a completion when it is done. Plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length"]
TopLogprobs = tuple[tuple[int, float], ...]
"""The likeliest tokens at one position, in falling order, and their logprobs."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Text of sample `index` that became certain, and the tokens behind it. A sample's last has a finish reason.

    logprobs: natural logarithm of each token's probability under the model, before penalties, temperature and filters.
    top_logprobs: one for each token, as many as the request asked for. times_s: when each was drawn, by
    time.perf_counter.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    top_logprobs: tuple[TopLogprobs, ...]
    times_s: tuple[float, ...] = ()
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a request: the prompt's (media included), and of all its samples together.

    cached_tokens: those of the prompt that were not computed, since a sequence before had begun with them.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Sample:
    """One whole answer. token_ids end with the end-of-sequence token where that ended it; the text does not show it."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    top_logprobs: tuple[TopLogprobs, ...]
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class Completion:
    """A request's answers, `n` of them. The properties are the first one's."""

    samples: tuple[Sample, ...]
    usage: Usage

    @property
    def text(self) -> str:
        return self.samples[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.samples[0].token_ids

    @property
    def logprobs(self) -> tuple[float, ...]:
        return self.samples[0].logprobs

    @property
    def top_logprobs(self) -> tuple[TopLogprobs, ...]:
        return self.samples[0].top_logprobs

    @property
    def finish_reason(self) -> FinishReason:
        return self.samples[0].finish_reason


def collect(pieces: list[Piece], usage: Usage) -> Completion:
    """Puts a finished request's pieces together, sample by sample."""
    by_sample: dict[int, list[Piece]] = {}
    for piece in pieces:
        by_sample.setdefault(piece.index, []).append(piece)
    return Completion(tuple(_join(by_sample[index]) for index in sorted(by_sample)), usage)


def _join(pieces: list[Piece]) -> Sample:
    reason = pieces[-1].finish_reason
    assert reason is not None
    return Sample(
        text="".join(piece.text for piece in pieces),
        token_ids=tuple(token for piece in pieces for token in piece.token_ids),
        logprobs=tuple(logprob for piece in pieces for logprob in piece.logprobs),
        top_logprobs=tuple(top for piece in pieces for top in piece.top_logprobs),
        finish_reason=reason,
    )
