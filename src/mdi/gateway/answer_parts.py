"""Answers as typed parts: text, thoughts, calls of tools and their ends, from the pieces of text that an engine gives.

All routes that answer chats render these parts, in a stream or collected.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from mdi.core.batch import Token
from mdi.core.outputs import FinishReason, Piece, Sample

EndReason = FinishReason | Literal["tool_calls"]


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More text of sample `index`. tokens: those that became certain with it, as in `Piece`."""

    index: int
    text: str
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """More of the thoughts of a sample."""

    index: int
    text: str
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True, slots=True)
class CallStart:
    """Call number `call` of a sample begins: its id, unique, and the name of the tool."""

    index: int
    call: int
    id: str
    name: str
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True, slots=True)
class ArgumentsDelta:
    """More of the JSON text of a call's arguments."""

    index: int
    call: int
    text: str
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True, slots=True)
class Finish:
    """The end of a sample, and its cause."""

    index: int
    reason: EndReason
    tokens: tuple[Token, ...] = ()


Part = TextDelta | ReasoningDelta | CallStart | ArgumentsDelta | Finish


@dataclass(frozen=True, slots=True)
class FunctionCall:
    """A whole call. arguments: JSON text; of a call that was cut off, its beginning."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Answer:
    """All parts of one sample together."""

    text: str
    reasoning: str
    calls: tuple[FunctionCall, ...]
    reason: EndReason
    tokens: tuple[Token, ...]


class AnswerReader:
    """Reads the pieces of one request's samples."""

    def __init__(self) -> None:
        self._samples: defaultdict[int, _SampleReader] = defaultdict(_SampleReader)

    def parts(self, piece: Piece) -> list[Part]:
        """The parts that became certain with this piece; none while text is held back."""
        return self._samples[piece.index].parts(piece)

    def whole(self, index: int, sample: Sample) -> Answer:
        """The answer of a sample that has ended."""
        return collected(self.parts(Piece(index, sample.text, sample.tokens, sample.finish_reason)))


class _SampleReader:
    """Reads the pieces of one sample. Tokens of a piece go with its first part, or wait for one."""

    def parts(self, piece: Piece) -> list[Part]:
        parts: list[Part] = []
        tokens = piece.tokens
        if piece.text or not piece.finish_reason:
            parts.append(TextDelta(piece.index, piece.text, tokens))
            tokens = ()
        if piece.finish_reason:
            parts.append(Finish(piece.index, piece.finish_reason, tokens))
        return parts


def collected(parts: Iterable[Part]) -> Answer:
    """One sample's parts together, up to its end."""
    text, reasoning, tokens = "", "", list[Token]()
    calls: list[FunctionCall] = []
    reason: EndReason = "length"
    for part in parts:
        tokens += part.tokens
        match part:
            case TextDelta():
                text += part.text
            case ReasoningDelta():
                reasoning += part.text
            case CallStart():
                calls.append(FunctionCall(part.id, part.name, ""))
            case ArgumentsDelta():
                call = calls[part.call]
                calls[part.call] = FunctionCall(call.id, call.name, call.arguments + part.text)
            case Finish():
                reason = part.reason
    return Answer(text, reasoning, tuple(calls), reason, tuple(tokens))
