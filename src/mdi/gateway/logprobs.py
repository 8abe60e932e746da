"""Logprobs in OpenAI's two shapes: of chats token by token, of completions in columns. Knows ids and their bytes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from itertools import accumulate
from typing import Any, Protocol

from mdi.core.outputs import TopLogprobs

LOWEST = -9999.0  # JSON has no infinity

Spell = Callable[[int], bytes]
"""The bytes that a token id stands for."""


class Told(Protocol):
    """Tokens and what is known of them: a piece, or a whole sample."""

    @property
    def token_ids(self) -> tuple[int, ...]: ...
    @property
    def logprobs(self) -> tuple[float, ...]: ...
    @property
    def top_logprobs(self) -> tuple[TopLogprobs, ...]: ...


Teller = Callable[[int, Told], dict[str, Any] | None]
"""What a choice's `logprobs` are: given the sample's index, and its next tokens."""


def nothing(_index: int, _told: Told) -> None:
    """For who did not ask."""


def chat_logprobs(spell: Spell) -> Teller:
    """As `choices[].logprobs` of a chat completion, or of one of its chunks."""

    def spelled(token_id: int, logprob: float) -> dict[str, Any]:
        data = spell(token_id)
        return {"token": _text(data), "logprob": max(logprob, LOWEST), "bytes": list(data)}

    def tell(_index: int, told: Told) -> dict[str, Any]:
        content = [
            spelled(token_id, logprob) | {"top_logprobs": [spelled(*candidate) for candidate in top]}
            for token_id, logprob, top in zip(told.token_ids, told.logprobs, told.top_logprobs, strict=True)
        ]
        return {"content": content, "refusal": None}

    return tell


def text_logprobs(spell: Spell) -> Teller:
    """As `choices[].logprobs` of a completion, or of one of its chunks: offsets go on from one to the next."""
    ends: dict[int, int] = defaultdict(int)

    def tell(index: int, told: Told) -> dict[str, Any]:
        tokens = [_text(spell(token_id)) for token_id in told.token_ids]
        *offsets, ends[index] = accumulate(map(len, tokens), initial=ends[index])
        chosen = zip(tokens, told.logprobs, told.top_logprobs, strict=True)
        return {
            "tokens": tokens,
            "token_logprobs": [max(logprob, LOWEST) for logprob in told.logprobs],
            "top_logprobs": [
                {_text(spell(token_id)): max(value, LOWEST) for token_id, value in top} | {token: max(logprob, LOWEST)}
                for token, logprob, top in chosen
            ],
            "text_offset": offsets,
        }

    return tell


def _text(data: bytes) -> str:
    return data.decode(errors="replace")
