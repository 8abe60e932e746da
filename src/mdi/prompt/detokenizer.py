"""Token ids to text, one by one, with stop strings. A character appears when all its bytes are there."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class Detokenizer:
    """The text of one sample while it grows.

    Text that could start a stop string is held back until it is certain. A stop string and the text after it are
    never returned.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._decoded = ""  # all text of the decoder
        self._shown = 0  # characters of it that were returned

    def push(self, token_id: int) -> str:
        """The text that became certain with this token. Sets `stopped` when a stop string is complete."""
        self._ids.append(token_id)
        self._decoded += self._decoder.step(self._tokenizer, token_id) or ""
        return self._show(len(self._decoded) - self._held_back())

    def finish(self) -> str:
        """The rest of the text: what was held back, and bytes that never became a character (as U+FFFD)."""
        if not self.stopped:
            complete = self._tokenizer.decode(self._ids, skip_special_tokens=True)
            self._decoded += complete[len(self._decoded) :]
        return self._show(len(self._decoded))

    def _show(self, end: int) -> str:
        if not self.stopped:
            found = [at for text in self._stop if (at := self._decoded.find(text, self._shown)) >= 0]
            if found:
                self.stopped = True
                self._decoded = self._decoded[: min(found)]
                end = len(self._decoded)
        piece = self._decoded[self._shown : end]
        self._shown = max(self._shown, end)
        return piece

    def _held_back(self) -> int:
        """Length of the longest suffix of the text that starts a stop string."""
        longest = 0
        for text in self._stop:
            for length in range(min(len(text) - 1, len(self._decoded)), longest, -1):
                if self._decoded.endswith(text[:length]):
                    longest = length
                    break
        return longest
