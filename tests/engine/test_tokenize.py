"""Prompts to token ids and back, without computing anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mdi import Engine, RawText, SamplingParams, TokenIds
from mdi.core.errors import InputError, PromptTooLongError
from mdi.prompt.builder import COUNTED_TOKENS


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: Path) -> Any:
    with Engine(tiny_checkpoint, sequence_length=256, max_sequences=2) as engine:
        yield engine


def test_the_ids_are_those_of_the_request(engine: Engine, photograph: bytes) -> None:
    content = [{"type": "image", "image": photograph}, {"type": "text", "text": "What is this?"}]
    for prompt in (
        "hello",
        RawText("hello"),
        TokenIds((5, 6, 7)),
        [{"role": "user", "content": "hello"}],
        [{"role": "user", "content": content}],
    ):
        stream = engine.submit(prompt, SamplingParams(max_tokens=1))
        stream.completion()
        assert engine.tokenize(prompt) == stream.prompt_token_ids
        assert len(stream.prompt_token_ids) == stream.usage.prompt_tokens
    assert engine.load.running + engine.load.waiting == 0


def test_ids_become_text_with_special_tokens(engine: Engine) -> None:
    prompt = [{"role": "user", "content": "hällo"}]
    text = engine.detokenize(engine.tokenize(prompt))
    assert "hällo" in text
    assert engine.tokenize(RawText(text)) == engine.tokenize(prompt)


def test_ids_beyond_the_vocabulary_are_refused(engine: Engine) -> None:
    with pytest.raises(InputError, match="no token 99999") as caught:
        engine.detokenize([5, 99999])
    assert caught.value.field == "tokens"


def test_what_is_too_long_for_an_answer_is_counted(engine: Engine) -> None:
    text = RawText("some words " * 300)
    with pytest.raises(PromptTooLongError, match="sequence length is 256"):
        engine.submit(text).completion()
    assert len(engine.tokenize(text)) > 256
    assert engine.detokenize(engine.tokenize(text)) == text.text


def test_what_would_take_seconds_to_count_is_refused(engine: Engine) -> None:
    with pytest.raises(PromptTooLongError, match=f"fewer than {COUNTED_TOKENS} are counted: send it in parts"):
        engine.tokenize(RawText("words " * COUNTED_TOKENS))


def test_unusable_media_are_refused(engine: Engine) -> None:
    with pytest.raises(InputError):
        engine.tokenize([{"role": "user", "content": [{"type": "image", "image": b"no picture"}]}])
