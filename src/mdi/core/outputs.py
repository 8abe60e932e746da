"""The results of a request: pieces while it runs, a completion at its end. Plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from mdi.core.batch import Token

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Piece:
    """Text of sample `index` that became certain, and its tokens. The last piece of a sample has a finish reason.

    stopped_by: the stop string, or the token of `stop_token_ids`, that ended it.
    """

    index: int
    text: str
    tokens: tuple[Token, ...]
    finish_reason: FinishReason | None = None
    stopped_by: str | int | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a request: of the prompt (media included), and of all its samples together.

    cached_tokens: tokens of the prompt that were not computed, because an earlier sequence had the same prefix.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timing:
    """When a request came to each of its steps, by time.monotonic; None before that.

    arrived_s: it was accepted. prepared_s: its prompt was ready, media fetched and decoded. encoded_s: its last image
    or video was encoded; None without media. scheduled_s: it was first part of a batch. first_token_s, last_token_s:
    the engine received them, the last one of all samples.
    """

    arrived_s: float
    prepared_s: float | None = None
    encoded_s: float | None = None
    scheduled_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None

    @classmethod
    def of_all(cls, parts: Sequence[Timing]) -> Timing:
        """Of several requests as one: the first to come to each step, and the last token of all."""
        return cls(
            min(part.arrived_s for part in parts),
            min((part.prepared_s for part in parts if part.prepared_s is not None), default=None),
            min((part.encoded_s for part in parts if part.encoded_s is not None), default=None),
            min((part.scheduled_s for part in parts if part.scheduled_s is not None), default=None),
            min((part.first_token_s for part in parts if part.first_token_s is not None), default=None),
            max((part.last_token_s for part in parts if part.last_token_s is not None), default=None),
        )


@dataclass(frozen=True, slots=True)
class Sample:
    """One complete answer. Its tokens include the end-of-sequence token that ended it; the text does not.

    pieces: those that it came in. stopped_by: see `Piece`.
    """

    text: str
    tokens: tuple[Token, ...]
    finish_reason: FinishReason
    pieces: tuple[Piece, ...] = ()
    stopped_by: str | int | None = None

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(token.id for token in self.tokens)

    @property
    def logprobs(self) -> tuple[float, ...]:
        return tuple(token.logprob for token in self.tokens)


@dataclass(frozen=True, slots=True)
class Completion:
    """The answers to a request, `n` of them. The properties are those of the first answer."""

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
    def finish_reason(self) -> FinishReason:
        return self.samples[0].finish_reason


def collect(pieces: list[Piece], usage: Usage) -> Completion:
    """The completion of a finished request, from its pieces."""
    by_sample: dict[int, list[Piece]] = {}
    for piece in pieces:
        by_sample.setdefault(piece.index, []).append(piece)
    return Completion(tuple(_join(by_sample[index]) for index in sorted(by_sample)), usage)


def joined(pieces: Sequence[Piece]) -> Piece:
    """Pieces of one sample that follow each other, as one."""
    text = "".join(piece.text for piece in pieces)
    return replace(pieces[-1], text=text, tokens=tuple(token for piece in pieces for token in piece.tokens))


def _join(pieces: list[Piece]) -> Sample:
    whole = joined(pieces)
    assert whole.finish_reason is not None
    return Sample(whole.text, whole.tokens, whole.finish_reason, tuple(pieces), whole.stopped_by)
