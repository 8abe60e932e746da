"""Text of an answer to text, calls and arguments, while it grows. Any split of the text gives the same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mdi.tools.json_end import JsonEnd
from mdi.tools.marks import find_mark
from mdi.tools.syntax import Syntax

Heads = Mapping[str, str]
"""Names of tools by the texts that begin calls of them."""


@dataclass(frozen=True, slots=True)
class Text:
    """More text beside calls."""

    text: str


@dataclass(frozen=True, slots=True)
class Call:
    """A call begins."""

    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """More of the JSON text of the last call's arguments."""

    text: str


Event = Text | Call | Arguments


class CallParser:
    """Finds calls of the tools `names` in one answer.

    Text that may begin a call is held back until it is certain. White space between text and calls is no text. What
    follows a mark and is no call is text.
    """

    def __init__(self, syntax: Syntax, names: Iterable[str]) -> None:
        heads = {syntax.head(name): name for name in names}
        self._marks = syntax.marks
        self._anywhere = _with_begins([begin for begin in syntax.begins if begin], heads)
        self._at_start: Heads = heads if "" in syntax.begins else {}
        self._behind = _with_begins([syntax.separator], heads) if syntax.separator else {}
        self._after, self._end = syntax.after, syntax.end
        self._buffer = ""
        self._space = ""  # white space that is text if more text follows
        self._started = False  # text was found, or a call
        self._called = False
        self._arguments: JsonEnd | None = None
        self._expected = ""  # what stands behind the arguments
        self._behind_call = False

    @property
    def whole(self) -> bool:
        """Whether every call that began has all its arguments."""
        return self._arguments is None

    def push(self, text: str) -> list[Event]:
        """The events that became certain with more text."""
        self._buffer += text
        return self._events(final=False)

    def finish(self) -> list[Event]:
        """The rest, once no text follows. The beginning of a call without arguments is dropped."""
        events = self._events(final=True)
        if self._space and not self._called:
            events.append(Text(self._space))
        return events

    def _events(self, *, final: bool) -> list[Event]:
        events: list[Event] = []
        while self._buffer:
            if self._arguments:
                self._read_arguments(self._arguments, events)
            elif self._expected:
                if not self._read_expected(final):
                    break
            elif self._behind_call:
                if not self._read_behind(events, final):
                    break
            elif not self._read_text(events, final):
                break
        return events

    def _read_arguments(self, arguments: JsonEnd, events: list[Event]) -> None:
        events.append(Arguments(self._take(arguments.push(self._buffer))))
        if arguments.found:
            self._arguments, self._expected, self._behind_call = None, self._after, True

    def _read_expected(self, final: bool) -> bool:
        """Reads what stands behind the arguments. False: more text is needed."""
        if self._buffer.startswith(self._expected):
            self._take(len(self._expected))
        elif self._expected.startswith(self._buffer):
            if final:
                self._buffer = ""
            return False
        self._expected = ""
        return True

    def _read_behind(self, events: list[Event], final: bool) -> bool:
        """Reads what stands behind a call: a further one, or the end of all. False: more text is needed."""
        if self._begin(self._behind, events):
            return True
        if self._end and self._buffer.startswith(self._end):
            self._take(len(self._end))
        elif any(head.startswith(self._buffer) for head in self._behind):
            if final:
                self._buffer = ""
            return False
        self._behind_call = False
        return True

    def _read_text(self, events: list[Event], final: bool) -> bool:
        """Reads text up to the next call, if there is one. False: more text is needed."""
        if not self._started:
            self._space += self._take(len(self._buffer) - len(self._buffer.lstrip()))
            if not self._buffer or self._begin(self._at_start, events):
                return bool(self._buffer)
            if not final and any(head.startswith(self._buffer) for head in self._at_start):
                return False
        place, marked = find_mark(self._buffer, self._marks)
        self._write(self._take(place), events)
        if not marked:
            if final:
                self._write(self._take(len(self._buffer)), events)
            return False
        if self._begin(self._anywhere, events):
            return True
        if any(head.startswith(self._buffer) for head in self._anywhere):
            if final:
                self._buffer = ""
            return False
        self._write(self._take(1), events)
        return True

    def _begin(self, heads: Heads, events: list[Event]) -> bool:
        """Begins a call if one stands here."""
        head = next((head for head in heads if self._buffer.startswith(head)), None)
        if head is None:
            return False
        self._take(len(head))
        self._space, self._started, self._called = "", True, True
        self._arguments = JsonEnd()
        events.append(Call(heads[head]))
        return True

    def _write(self, text: str, events: list[Event]) -> None:
        """Gives text out, but the white space at its end."""
        kept = text.rstrip()
        if kept:
            events.append(Text(self._space + kept))
            self._space, self._started = "", True
        self._space += text[len(kept) :]

    def _take(self, length: int) -> str:
        taken, self._buffer = self._buffer[:length], self._buffer[length:]
        return taken


def _with_begins(begins: Iterable[str], heads: Heads) -> Heads:
    return {begin + head: name for begin in begins for head, name in heads.items()}
