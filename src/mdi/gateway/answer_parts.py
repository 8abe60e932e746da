"""Answers as typed parts: text, thoughts, calls of tools and their ends, from the pieces of text that an engine gives.

All routes that answer chats render these parts, in a stream or collected.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from mdi.core.batch import Token
from mdi.core.outputs import FinishReason, Piece, Sample
from mdi.tools.parser import Arguments, Call, CallParser, Event, Text
from mdi.tools.syntax import SYNTAXES
from mdi.tools.thoughts import Thought, ThoughtSplitter

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
    """The end of a sample, and its cause. stopped_by: see `Piece`."""

    index: int
    reason: EndReason
    tokens: tuple[Token, ...] = ()
    stopped_by: str | int | None = None


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
    """Reads the pieces of one request's samples.

    syntax, names: how calls are written, and which tools may be called; without names, what looks like a call is text.
    named: the request names the tool to call, and OpenAI's reason of such an end is stop. thoughts: the marks around
    them; None to leave them in the text. opened: called at the first piece: whether the prompt has the first mark.
    """

    def __init__(
        self,
        syntax: str = "generic",
        names: Sequence[str] = (),
        *,
        named: bool = False,
        thoughts: tuple[str, str] | None = None,
        opened: Callable[[], bool] = lambda: False,
    ) -> None:
        self._syntax = SYNTAXES[syntax]
        self._names = names
        self._named = named
        self._thoughts = thoughts
        self._opened = opened
        self._samples: dict[int, _SampleReader] = {}

    @property
    def reasoning_tokens(self) -> int | None:
        """Tokens of thoughts so far, marks included; None where thoughts are not looked for."""
        return sum(sample.reasoning_tokens for sample in self._samples.values()) if self._thoughts else None

    def parts(self, piece: Piece) -> list[Part]:
        """The parts that became certain with this piece; none while text is held back."""
        if piece.index not in self._samples:
            splitter = ThoughtSplitter(self._thoughts, opened=self._opened()) if self._thoughts else None
            parser = CallParser(self._syntax, self._names) if self._names else None
            self._samples[piece.index] = _SampleReader(piece.index, splitter, parser, self._named)
        return self._samples[piece.index].parts(piece)

    def whole(self, index: int, sample: Sample) -> Answer:
        """The answer of a sample that has ended."""
        pieces = sample.pieces or (Piece(index, sample.text, sample.tokens, sample.finish_reason),)
        return collected([part for piece in pieces for part in self.parts(piece)])


class _SampleReader:
    """Reads the pieces of one sample. Tokens go with the next part that becomes certain."""

    def __init__(self, index: int, splitter: ThoughtSplitter | None, parser: CallParser | None, named: bool) -> None:
        self.reasoning_tokens = 0
        self._index = index
        self._splitter = splitter
        self._parser = parser
        self._named = named
        self._calls = 0
        self._tokens: tuple[Token, ...] = ()

    def parts(self, piece: Piece) -> list[Part]:
        self._tokens += piece.tokens
        parts = [self._part(event) for event in self._events(piece)]
        if piece.finish_reason:
            reason = self._reason(piece.finish_reason)
            parts.append(Finish(self._index, reason, stopped_by=piece.stopped_by))
        if parts:
            parts[0] = replace(parts[0], tokens=self._tokens)
            self._tokens = ()
        return parts

    def _events(self, piece: Piece) -> Iterator[Event | Thought]:
        final = piece.finish_reason is not None
        for part in self._split(piece, final):
            if isinstance(part, Thought):
                yield part
            elif self._parser:
                yield from self._parser.push(part)
            else:
                yield Text(part)
        if final and self._parser:
            yield from self._parser.finish()

    def _split(self, piece: Piece, final: bool) -> Sequence[Thought | str]:
        if self._splitter is None:
            return (piece.text,) if piece.text else ()
        thinking = self._splitter.thinking
        parts = self._splitter.push(piece.text, final=final)
        if thinking or self._splitter.thinking or any(isinstance(part, Thought) for part in parts):
            self.reasoning_tokens += len(piece.tokens)
        return parts

    def _part(self, event: Event | Thought) -> Part:
        match event:
            case Thought(text):
                return ReasoningDelta(self._index, text)
            case Text(text):
                return TextDelta(self._index, text)
            case Call(name):
                self._calls += 1
                return CallStart(self._index, self._calls - 1, f"call_{secrets.token_hex(12)}", name)
            case Arguments(text):
                return ArgumentsDelta(self._index, self._calls - 1, text)

    def _reason(self, reason: FinishReason) -> EndReason:
        """Why the sample ended. A call that was cut off does not count as one."""
        called = self._calls and self._parser and self._parser.whole and not self._named
        return "tool_calls" if called and reason == "stop" else reason


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
