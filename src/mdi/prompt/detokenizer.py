"""Token ids to text, one by one, with stop strings. A character appears when all its bytes are there."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from tokenizers import Tokenizer

MAX_CHARACTER_TOKENS = 4  # a character of UTF-8 has at most four bytes, and a token at least one
MAX_WINDOW = 64
UNFINISHED = "\ufffd"


class Detokenizer:
    """The text of one sample while it grows.

    Text that could start a stop string is held back until it is certain. A stop string and the text after it are
    never returned. The first stop string to be complete counts; of several that end together, the longest.
    include_stop: the stop string itself is returned.
    min_tokens: stop strings count when they end after so many tokens. skip_special_tokens: see `SamplingParams`. marks:
    special tokens that are shown all the same, by their names; the text behind one is decoded as a text of its own.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        *,
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
        marks: frozenset[int] = frozenset(),
        include_stop: bool = False,
    ) -> None:
        self.stopped_by: str | None = None
        self._include_stop = include_stop
        self._searches = [StopSearch(text) for text in stop]
        self._min_tokens = min_tokens
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._marks = marks if skip_special_tokens else frozenset()
        self._decoder = IncrementalDecoder(tokenizer, skip_special_tokens)
        self._n_tokens = 0
        self._pending = ""  # decoded and not returned: it could start a stop string

    def push(self, token_id: int) -> str:
        """The text that became certain with this token. Sets `stopped_by` when a stop string is complete."""
        self._n_tokens += 1
        self._take(self._mark(token_id) if token_id in self._marks else self._decoder.push(token_id))
        return self._show(max((search.held for search in self._searches), default=0))

    def finish(self) -> str:
        """The rest of the text: what was held back, and bytes that never became a character (as U+FFFD)."""
        self._take(self._decoder.finish())
        return self._show(0)

    def _mark(self, token_id: int) -> str:
        """What was not certain before a mark, and the mark."""
        before = self._decoder.finish()
        self._decoder = IncrementalDecoder(self._tokenizer, self._skip)
        return before + self._tokenizer.decode([token_id], skip_special_tokens=False)

    def _take(self, text: str) -> None:
        """Adds text to what is pending, up to the first stop string that counts; nothing after it."""
        if self.stopped_by:
            return
        before, self._pending = len(self._pending), self._pending + text
        for end, character in enumerate(text if self._searches else "", before + 1):
            complete = [search.text for search in self._searches if search.advance(character)]
            if complete and self._n_tokens > self._min_tokens:
                self.stopped_by = max(complete, key=len)
                self._pending = self._pending[: end if self._include_stop else end - len(self.stopped_by)]
                return

    def _show(self, held: int) -> str:
        end = len(self._pending) - (0 if self.stopped_by else held)
        shown, self._pending = self._pending[:end], self._pending[end:]
        return shown


class StopSearch:
    """The search for one stop string in a text that grows, at a cost per character that its length does not change.

    Source: Knuth, Morris and Pratt, "Fast pattern matching in strings", 1977.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.length = len(text)
        self._borders = _borders(text)
        self._matched = 0  # first characters of the stop string that the text ends with

    @property
    def held(self) -> int:
        """Length of the text's end that could start the stop string."""
        return self._matched if self._matched < self.length else self._borders[self.length]

    def advance(self, character: str) -> bool:
        """Takes one more character. Returns whether the text now ends with the stop string."""
        matched = self.held
        while matched and self.text[matched] != character:
            matched = self._borders[matched]
        self._matched = matched + (self.text[matched] == character)
        return self._matched == self.length


@lru_cache(maxsize=64)  # the samples of a request share them
def _borders(text: str) -> tuple[int, ...]:
    """For each number of first characters: length of the longest proper prefix of them that they end with."""
    borders = [0, 0]
    matched = 0
    for character in text[1:]:
        while matched and text[matched] != character:
            matched = borders[matched]
        matched += text[matched] == character
        borders.append(matched)
    return tuple(borders)


class IncrementalDecoder:
    """Text of a growing list of tokens: all pieces together are what decoding the whole list gives.

    Only tokens since the last complete character are decoded again, with those before them that decide about spaces.
    Bytes that cannot become a character appear as U+FFFD once later tokens show it. Where the checkpoint's decoder
    takes back what it gave (broken bytes after whole characters, with byte fallback), what was returned stays.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._window: list[int] = []
        self._context = 0  # tokens at the start of the window whose text was returned
        self._text = ""  # of the window
        self._returned = 0  # characters of it
        self._unfinished = 0  # tokens that may be bytes of an unfinished character

    def push(self, token_id: int) -> str:
        """The text that became certain with this token."""
        self._window.append(token_id)
        before, self._text = self._text, self._decode()
        unfinished = self._text.endswith(UNFINISHED)
        self._unfinished = self._unfinished + (self._text != before) if unfinished else 0
        if 0 < self._unfinished < MAX_CHARACTER_TOKENS:
            return ""
        new = self._text[self._returned : len(self._text) - unfinished]
        if new:
            self._keep_pending(unfinished)
        elif len(self._window) > MAX_WINDOW:  # tokens that add no text
            del self._window[self._context : -MAX_CHARACTER_TOKENS]
        return new

    def finish(self) -> str:
        """The rest of the text, once no token follows."""
        return self._text[self._returned :]

    def _keep_pending(self, unfinished: bool) -> None:
        """All text was returned but a last U+FFFD that may become a character: its tokens are the new context."""
        del self._window[: self._context]
        self._context = len(self._window)
        self._text = self._decode()
        self._returned = len(self._text) - unfinished
        self._unfinished = int(unfinished)

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window, skip_special_tokens=self._skip)
