"""When a constraint begins to hold: behind the text that begins it, or behind the model's thoughts.

All of it depends on the tokens of an answer only, so that a replay gets the same masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from typing import Protocol, Self

from mdi.core.constraint import Constraint


class Rule(Protocol):
    """What may come next in one answer. See `Matcher`; a mask of None allows all."""

    @property
    def complete(self) -> bool: ...
    def copy(self) -> Self: ...
    def push(self, token_id: int) -> None: ...
    def mask(self, end_ids: Iterable[int], *, may_end: bool) -> bytes | None: ...


class Grammar(Rule, Protocol):
    """A rule that can take the text it begins with."""

    def accepts(self, token_ids: Sequence[int]) -> bool: ...
    def accepts_text(self, text: bytes) -> bool: ...


class WhenBegun:
    """A constraint that holds from one of its `begins` on.

    start: its grammar, which begins with that text. text_of: the bytes that a token adds to the text of an answer.
    special: special tokens that may be among `begins`, with their ids.
    """

    def __init__(
        self, start: Grammar, constraint: Constraint, text_of: Callable[[int], bytes], special: Mapping[str, int]
    ) -> None:
        self._start = start
        self._begins = [begin.encode() for begin in constraint.begins]
        self._opens = [begin.encode() for begin in constraint.opens]
        self._repeats = constraint.repeats
        self._text_of = text_of
        self._special = {special[begin] for begin in constraint.begins if begin in special}
        self._held: Grammar | None = None
        self._text = b""  # the end of the free text, in which a begin may stand
        self._opening = bool(self._opens)  # the answer may still begin with one of `opens`

    @property
    def complete(self) -> bool:
        """Whether no text can follow."""
        return self._held is not None and self._held.complete

    def copy(self) -> Self:
        """Another answer at the same place."""
        made = copy(self)
        made._held = self._held and self._held.copy()
        return made

    def mask(self, end_ids: Iterable[int], *, may_end: bool) -> bytes | None:
        """See `Matcher`."""
        return self._held.mask(end_ids, may_end=may_end) if self._held else None

    def push(self, token_id: int) -> None:
        """Takes the next token of the answer. Raises InputError: see `Matcher`."""
        if self._held:
            self._held.push(token_id)
            if self._held.complete and self._repeats:
                self._held, self._text = None, b""
        elif token_id in self._special:
            self._text, self._opening = b"", False
            self._hold(lambda held: held.accepts((token_id,)))
        elif text := self._text_of(token_id):
            self._look(text)

    def _look(self, text: bytes) -> None:
        """Looks for a begin in the free text, which has become longer."""
        self._text = (self._text + text).lstrip() if self._opening else self._text + text
        if self._opening and self._text:
            if self._begun(self._text, self._opens):
                return
            self._opening = any(begin.startswith(self._text) for begin in self._opens)
        while found := [place for begin in self._begins if (place := self._text.find(begin)) >= 0]:
            self._text = self._text[min(found) :]
            if self._begun(self._text, self._begins):
                return
            self._text = self._text[1:]
        if not self._opening:
            self._text = self._text[-max(map(len, self._begins), default=1) :]

    def _begun(self, text: bytes, begins: list[bytes]) -> bool:
        """Whether the constraint holds from the start of this text on."""
        return any(map(text.startswith, begins)) and self._hold(lambda held: held.accepts_text(text))

    def _hold(self, accepted: Callable[[Grammar], bool]) -> bool:
        held = self._start.copy()
        if not accepted(held):
            return False
        self._held = held
        return True


class AfterThoughts:
    """A rule that holds behind the model's thoughts.

    marks: the tokens that begin and end thoughts. opened: the prompt has the first one; otherwise the answer may begin
    with it. An answer does not end in its thoughts where the rule wants some text.
    """

    def __init__(self, rule: Rule, marks: tuple[int, int], *, opened: bool) -> None:
        self._rule = rule
        self._start, self._end = marks
        self._thinking = opened
        self._begun = opened

    @property
    def complete(self) -> bool:
        """Whether no text can follow."""
        return not self._thinking and self._rule.complete

    def copy(self) -> Self:
        """Another answer at the same place."""
        made = copy(self)
        made._rule = self._rule.copy()
        return made

    def push(self, token_id: int) -> None:
        """Takes the next token of the answer. Raises InputError: see `Matcher`."""
        begins = not self._begun and token_id == self._start
        self._begun = True
        if begins:
            self._thinking = True
        elif not self._thinking:
            self._rule.push(token_id)
        elif token_id == self._end:
            self._thinking = False

    def mask(self, end_ids: Iterable[int], *, may_end: bool) -> bytes | None:
        """See `Matcher`."""
        mask = self._rule.mask(end_ids, may_end=may_end)
        if mask is None or (self._begun and not self._thinking):
            return mask
        if not self._thinking:
            changed = bytearray(mask)
            changed[self._start // 8] |= 1 << self._start % 8
            return bytes(changed)
        changed = bytearray(b"\xff" * len(mask))
        for token_id in end_ids:
            changed[token_id // 8] &= ~(1 << token_id % 8)
        return bytes(changed)
