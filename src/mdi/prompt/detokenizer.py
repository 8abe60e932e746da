"""Token ids to text, one by one: characters appear when all their bytes are there. Knows stop strings, no requests."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class Detokenizer:
    """One sample's text as it grows.

    Text that could be the beginning of a stop string is held back until it is certain; a stop string and what
    follows it is never shown.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._decoded = ""  # everything the decoder gave
        self._shown = 0  # characters of it that are out

    def push(self, token_id: int) -> str:
        """The text that became certain with this token. Sets `stopped` when a stop string is complete."""
        self._ids.append(token_id)
        self._decoded += self._decoder.step(self._tokenizer, token_id) or ""
        return self._show(len(self._decoded) - self._held_back())

    def finish(self) -> str:
        """What is left at the end: held-back text, and bytes that never became a character (as U+FFFD)."""
        if not self.stopped:
            whole = self._tokenizer.decode(self._ids, skip_special_tokens=True)
            self._decoded += whole[len(self._decoded) :]
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
        """Length of the longest end of the text that begins a stop string."""
        longest = 0
        for text in self._stop:
            for length in range(min(len(text) - 1, len(self._decoded)), longest, -1):
                if self._decoded.endswith(text[:length]):
                    longest = length
                    break
        return longest
