"""Logprobs in OpenAI's two forms: a list of tokens for chats, columns for completions."""

from __future__ import annotations

import codecs
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from mdi.core.batch import Token
from mdi.core.outputs import Piece, Sample
from mdi.gateway.engine import TextEngine

LOWEST = -9999.0  # JSON has no infinity

ChatLogprobsOf = Callable[[Sequence[Token]], dict[str, Any] | None]
"""Makes the `logprobs` of a chat's choice from its next tokens."""


def no_logprobs(*_part: object) -> None:
    """No logprobs: the request does not ask for them."""


def chat_logprobs(engine: TextEngine, skip_special_tokens: bool) -> ChatLogprobsOf:
    """The `logprobs` of a chat's choices, or of its chunks. Tokens that the text leaves out have no bytes."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        shown = engine.token_bytes(token_id, skip_special_tokens=skip_special_tokens)
        name = engine.token_bytes(token_id).decode(errors="replace")
        return {"token": name, "logprob": max(logprob, LOWEST), "bytes": list(shown)}

    def logprobs_of(tokens: Sequence[Token]) -> dict[str, Any]:
        content = [
            entry(token.id, token.logprob) | {"top_logprobs": [entry(*top) for top in token.top_logprobs]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    return logprobs_of


class TextLogprobs:
    """The `logprobs` of a completion's choices, or of its chunks: offsets continue from one chunk to the next."""

    def __init__(self, engine: TextEngine, skip_special_tokens: bool) -> None:
        self._engine = engine
        self._skip = skip_special_tokens
        self._texts: dict[int, _Offsets] = defaultdict(_Offsets)

    def of(self, index: int, part: Piece | Sample) -> dict[str, list[Any]]:
        """Of the next tokens of sample `index`."""
        shown = [self._engine.token_bytes(token.id, skip_special_tokens=self._skip) for token in part.tokens]
        return self._columns(part.tokens) | {"text_offset": self._texts[index].of(part.text, shown)}

    def of_prompt(
        self, index: int, text: str, token_ids: Sequence[int], tokens: Sequence[Token]
    ) -> dict[str, list[Any]]:
        """Of a prompt, which the choice begins with. tokens: all but the first, which has no logprob."""
        columns = self._columns((Token(token_ids[0], 0.0), *tokens))
        columns["token_logprobs"][0] = columns["top_logprobs"][0] = None
        return columns | {
            "text_offset": self._texts[index].of(text, [self._within(text, token) for token in token_ids])
        }

    def _columns(self, tokens: Sequence[Token]) -> dict[str, list[Any]]:
        return {
            "tokens": [self._name(token.id) for token in tokens],
            "token_logprobs": [max(token.logprob, LOWEST) for token in tokens],
            "top_logprobs": [
                {self._name(token_id): max(logprob, LOWEST) for token_id, logprob in token.top_logprobs}
                | {self._name(token.id): max(token.logprob, LOWEST)}
                for token in tokens
            ],
        }

    def _name(self, token_id: int) -> str:
        return token_name(self._engine.token_bytes(token_id))

    def _within(self, text: str, token_id: int) -> bytes:
        """A token's part of a prompt's text: none of a special token that the tokenizer added."""
        whole = self._engine.token_bytes(token_id)
        special = not self._engine.token_bytes(token_id, skip_special_tokens=True)
        return b"" if special and whole.decode(errors="replace") not in text else whole


def joined(*columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Several parts of one text as one."""
    return {name: [entry for part in columns for entry in part[name]] for name in columns[0]}


class _Offsets:
    """Where tokens begin in a text that grows by pieces."""

    def __init__(self) -> None:
        self._length = 0  # characters of the text so far
        self._begun = 0  # characters whose last byte came, of the text as it is without stop strings
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def of(self, text: str, tokens: list[bytes]) -> list[int]:
        """For each token the index of the character with its first byte; the text's end for one that adds nothing.

        text, tokens: of the next piece. What stands behind a stop string is no part of the text: its offset is the end.
        """
        self._length += len(text)
        return [min(self._start(token), self._length) for token in tokens]

    def _start(self, token: bytes) -> int:
        self._begun += self._count(token[:1])
        unfinished = bool(self._decoder.getstate()[0])
        start = self._begun if unfinished or not token else self._begun - 1
        self._begun += self._count(token[1:])
        return start

    def _count(self, part: bytes) -> int:
        """Characters that these bytes end."""
        return sum(len(self._decoder.decode(bytes((byte,)))) + self._dropped() for byte in part)

    def _dropped(self) -> int:
        """Takes half a surrogate, which no third byte makes a character, from the decoder, which waits for one."""
        waiting = self._decoder.getstate()[0]
        if waiting[:1] != b"\xed" or waiting[1:] < b"\xa0":
            return 0
        self._decoder.reset()
        return len(waiting)


def token_name(token: bytes) -> str:
    """A token's text, or, as OpenAI writes it, the bytes of one that is no whole characters: `bytes:\\xf0\\x9f`."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)
