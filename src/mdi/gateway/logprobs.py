"""Logprobs in OpenAI's two shapes: of chats token by token, of completions in columns. Knows ids and their bytes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from itertools import accumulate
from typing import Any, Protocol

from mdi.core.batch import Token

LOWEST = -9999.0  # JSON has no infinity

Spell = Callable[[int], bytes]
"""The bytes that a token id stands for."""


class Drawn(Protocol):
    """A piece or a sample: tokens with their logprobs."""

    @property
    def tokens(self) -> tuple[Token, ...]: ...


Teller = Callable[[int, Drawn], dict[str, Any] | None]
"""What a choice's `logprobs` are: given the sample's index, and its next tokens."""


def nothing(_index: int, _drawn: Drawn) -> None:
    """For who did not ask."""


def chat_logprobs(spell: Spell) -> Teller:
    """As `choices[].logprobs` of a chat completion, or of one of its chunks."""

    def spelled(token_id: int, logprob: float) -> dict[str, Any]:
        data = spell(token_id)
        return {"token": _text(data), "logprob": max(logprob, LOWEST), "bytes": list(data)}

    def tell(_index: int, drawn: Drawn) -> dict[str, Any]:
        content = [
            spelled(token.id, token.logprob) | {"top_logprobs": [spelled(*top) for top in token.top_logprobs]}
            for token in drawn.tokens
        ]
        return {"content": content, "refusal": None}

    return tell


def text_logprobs(spell: Spell) -> Teller:
    """As `choices[].logprobs` of a completion, or of one of its chunks: offsets go on from one to the next."""
    ends: dict[int, int] = defaultdict(int)

    def tell(index: int, drawn: Drawn) -> dict[str, Any]:
        texts = [_text(spell(token.id)) for token in drawn.tokens]
        *offsets, ends[index] = accumulate(map(len, texts), initial=ends[index])
        return {
            "tokens": texts,
            "token_logprobs": [max(token.logprob, LOWEST) for token in drawn.tokens],
            "top_logprobs": [
                {_text(spell(token_id)): max(value, LOWEST) for token_id, value in token.top_logprobs}
                | {text: max(token.logprob, LOWEST)}
                for text, token in zip(texts, drawn.tokens, strict=True)
            ],
            "text_offset": offsets,
        }

    return tell


def _text(data: bytes) -> str:
    return data.decode(errors="replace")
