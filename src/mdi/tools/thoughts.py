"""Thoughts and the answer behind them, in a text that grows by pieces. Any split of the text gives the same."""

from __future__ import annotations

from dataclasses import dataclass

from mdi.tools.marks import find_mark


@dataclass(frozen=True, slots=True)
class Thought:
    """More of the thoughts."""

    text: str


class ThoughtSplitter:
    """Splits the thoughts at an answer's start from the rest.

    marks: what begins and ends thoughts. opened: the prompt has the first mark already. White space around thoughts is
    left out. Without a first mark there are no thoughts, and the text stays as it is.
    """

    def __init__(self, marks: tuple[str, str], *, opened: bool) -> None:
        self._start, self._end = marks
        self.thinking = opened
        self._begun = False  # whether it is known how the text begins
        self._buffer = ""
        self._thought = False  # thoughts were given out
        self._space = ""  # white space that belongs to thoughts if more of them follow
        self._behind_thoughts = False  # no text of the answer was given out yet

    def push(self, text: str, *, final: bool = False) -> list[Thought | str]:
        """What became certain with more text: thoughts, and texts of the answer. final: no text follows."""
        self._buffer += text
        parts: list[Thought | str] = []
        if not self._begun and not self._begin(final):
            return parts
        if self.thinking:
            self._read_thoughts(parts, final)
        if not self.thinking:
            self._read_answer(parts)
        return parts

    def _begin(self, final: bool) -> bool:
        """Removes a first mark. False: more text is needed."""
        text = self._buffer.lstrip()
        if text.startswith(self._start):
            self.thinking, self._buffer = True, text.removeprefix(self._start)
        elif self._start.startswith(text) and not final:
            return False
        self._begun = True
        return True

    def _read_thoughts(self, parts: list[Thought | str], final: bool) -> None:
        place, ended = find_mark(self._buffer, (self._end,))
        if final and not ended:
            place = len(self._buffer)
        text, self._buffer = self._space + self._buffer[:place], self._buffer[place:]
        text = text if self._thought else text.lstrip()
        kept = text.rstrip()
        self._space = text[len(kept) :]
        if kept:
            self._thought = True
            parts.append(Thought(kept))
        if ended:
            self._buffer = self._buffer.removeprefix(self._end)
            self.thinking, self._behind_thoughts = False, True

    def _read_answer(self, parts: list[Thought | str]) -> None:
        text, self._buffer = self._buffer, ""
        if self._behind_thoughts:
            text = text.lstrip()
        if text:
            self._behind_thoughts = False
            parts.append(text)
