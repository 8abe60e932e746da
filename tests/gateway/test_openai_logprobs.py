"""Logprobs of chats and completions."""

from __future__ import annotations

from typing import Any

import pytest

from tests.gateway.conftest import RealServer


def test_the_openai_client_gets_logprobs_of_chats(real: RealServer) -> None:
    request: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5, "temperature": 0}
    request |= {"model": "tiny", "logprobs": True, "top_logprobs": 3, "extra_body": {"ignore_eos": True}}
    whole = real.client.chat.completions.create(**request).choices[0]
    chunks = [chunk.choices[0] for chunk in real.client.chat.completions.create(**request, stream=True)]
    assert whole.logprobs
    assert whole.logprobs.content
    reported = whole.logprobs.content
    assert [entry.logprob for entry in reported] == [entry.top_logprobs[0].logprob for entry in reported]
    assert [len(entry.top_logprobs) for entry in reported] == [3] * 5
    assert b"".join(bytes(entry.bytes or ()) for entry in reported).decode(errors="replace") == whole.message.content
    streamed = [entry for chunk in chunks if chunk.logprobs for entry in chunk.logprobs.content or ()]
    assert [(entry.token, entry.bytes) for entry in streamed] == [(entry.token, entry.bytes) for entry in reported]
    for again, entry in zip(streamed, reported, strict=True):  # of a prompt whose keys and values were kept
        assert again.logprob == pytest.approx(entry.logprob, abs=1e-4)


def test_the_openai_client_gets_logprobs_of_completions(real: RealServer) -> None:
    request: dict[str, Any] = {"model": "tiny", "prompt": "Once", "max_tokens": 5, "temperature": 0, "logprobs": 2}
    whole = real.client.completions.create(**request).choices[0]
    chunks = [chunk.choices[0] for chunk in real.client.completions.create(**request, stream=True)]
    assert whole.logprobs
    assert whole.logprobs.tokens
    assert whole.logprobs.token_logprobs
    assert whole.logprobs.top_logprobs
    assert whole.logprobs.text_offset
    for token, logprob, top in zip(
        whole.logprobs.tokens, whole.logprobs.token_logprobs, whole.logprobs.top_logprobs, strict=True
    ):
        assert top[token] == logprob == max(top.values())
    assert whole.logprobs.text_offset[0] == 0
    offsets = [offset for chunk in chunks if chunk.logprobs for offset in chunk.logprobs.text_offset or ()]
    assert offsets == whole.logprobs.text_offset
