"""Logprobs in OpenAI's two forms: a list of tokens for chats, columns for completions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from itertools import accumulate
from typing import Any

from mdi.core.outputs import Piece, Sample

LOWEST = -9999.0  # JSON has no infinity

TokenBytes = Callable[[int], bytes]
"""The bytes of a token id's text."""

LogprobsOf = Callable[[int, Piece | Sample], dict[str, Any] | None]
"""Makes the `logprobs` of a choice, from the sample's index and its next tokens."""


def no_logprobs(_index: int, _part: Piece | Sample) -> None:
    """No logprobs: the request does not ask for them."""


def chat_logprobs(token_bytes: TokenBytes) -> LogprobsOf:
    """The `logprobs` of a chat completion's choices, or of its chunks."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        data = token_bytes(token_id)
        return {"token": _text(data), "logprob": max(logprob, LOWEST), "bytes": list(data)}

    def logprobs_of(_index: int, part: Piece | Sample) -> dict[str, Any]:
        content = [
            entry(token.id, token.logprob) | {"top_logprobs": [entry(*top) for top in token.top_logprobs]}
            for token in part.tokens
        ]
        return {"content": content, "refusal": None}

    return logprobs_of


def text_logprobs(token_bytes: TokenBytes) -> LogprobsOf:
    """The `logprobs` of a completion's choices, or of its chunks: offsets continue from one chunk to the next."""
    ends: dict[int, int] = defaultdict(int)

    def logprobs_of(index: int, part: Piece | Sample) -> dict[str, Any]:
        texts = [_text(token_bytes(token.id)) for token in part.tokens]
        *offsets, ends[index] = accumulate(map(len, texts), initial=ends[index])
        return {
            "tokens": texts,
            "token_logprobs": [max(token.logprob, LOWEST) for token in part.tokens],
            "top_logprobs": [
                {_text(token_bytes(token_id)): max(logprob, LOWEST) for token_id, logprob in token.top_logprobs}
                | {text: max(token.logprob, LOWEST)}
                for text, token in zip(texts, part.tokens, strict=True)
            ],
            "text_offset": offsets,
        }

    return logprobs_of


def _text(data: bytes) -> str:
    return data.decode(errors="replace")
