"""Tokenizer, chat template and detokenizer against the libraries they stand on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from testing.checkpoints import tiny_config
from transformers import AutoTokenizer

from mdi.checkpoint.random_weights import write_random_checkpoint
from mdi.core.messages import parse_messages
from mdi.prompt.detokenizer import Detokenizer
from mdi.prompt.tokenizer import Tokenizer

SPECIAL_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
IMAGE = {"type": "image", "image": "cup.png"}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("text"), tiny_config())


@pytest.fixture(scope="module")
def tokenizer(path: Path) -> Tokenizer:
    return Tokenizer(path)


def decode_all(tokenizer: Tokenizer, text: str, *stop: str) -> tuple[list[str], bool]:
    """Pieces as they become certain, one per token and the rest, and whether a stop string was met."""
    detokenizer = Detokenizer(tokenizer.backend, stop)
    pieces = []
    for token in tokenizer.encode(text):
        pieces.append(detokenizer.push(token))
        if detokenizer.stopped:
            break
    return [*pieces, detokenizer.finish()], detokenizer.stopped


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "Hi"}],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " \n<a> < b\n"}],
        [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}, {"role": "user", "content": "3"}],
        [{"role": "user", "content": [IMAGE, {"type": "text", "text": "x"}, IMAGE]}],
    ],
)
def test_a_chat_is_tokenised_as_transformers_does(
    messages: list[dict[str, Any]], tokenizer: Tokenizer, path: Path
) -> None:
    theirs = AutoTokenizer.from_pretrained(path).apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    assert tokenizer.encode_chat(parse_messages(messages)) == AutoTokenizer.from_pretrained(path)(theirs).input_ids


@settings(max_examples=60, deadline=None)
@given(st.text())
def test_the_bytes_of_tokens_are_those_of_the_text(tokenizer: Tokenizer, text: str) -> None:
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))) == text.encode()


def test_special_tokens_stand_for_their_names(tokenizer: Tokenizer) -> None:
    [token_id] = tokenizer.backend.encode("<|im_end|>", add_special_tokens=False).ids
    assert tokenizer.token_bytes(token_id) == b"<|im_end|>"
    assert tokenizer.token_bytes(10**6) == b""


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([*SPECIAL_TOKENS, "<", "|>", "<|im_", "end|>", "a", "\n"]), min_size=1, max_size=8))
def test_no_user_text_ever_makes_a_special_token(tokenizer: Tokenizer, texts: list[str]) -> None:
    parts = [{"type": "text", "text": text} for text in texts]
    honest = [{"type": "text", "text": "x" * len(text)} for text in texts]
    n_bytes = 256

    def specials(content: list[dict[str, str]]) -> list[int]:
        messages = parse_messages([{"role": "user", "content": content}])
        return [token for token in tokenizer.encode_chat(messages) if token >= n_bytes]

    assert specials(parts) == specials(honest)


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet=st.characters(blacklist_categories=["Cs"]), max_size=40))
def test_text_survives_token_by_token(tokenizer: Tokenizer, text: str) -> None:
    whole = tokenizer.backend.decode(tokenizer.encode(text))
    pieces, _ = decode_all(tokenizer, text)
    assert "".join(pieces) == whole


def test_no_half_character_is_ever_shown(tokenizer: Tokenizer) -> None:
    pieces, _ = decode_all(tokenizer, "naïve 日本 🎉!")
    assert "".join(pieces) == "naïve 日本 🎉!"
    assert not any("\ufffd" in piece for piece in pieces)


def test_broken_bytes_are_shown_at_the_end(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer.backend)
    tokens = tokenizer.encode("a日")[:-1]
    shown = "".join(detokenizer.push(token) for token in tokens)
    assert shown == "a"
    assert "\ufffd" in detokenizer.finish()


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("hello END more", ["END"], "hello "),
        ("hello EN", ["END"], "hello EN"),
        ("aaab", ["aab"], "a"),
        ("one two", ["two", "one"], ""),
        ("abcabd", ["abd"], "abc"),
        ("日本語です", ["語"], "日本"),
        ("nothing", ["x", "yy"], "nothing"),
    ],
)
def test_stop_strings_end_the_text_before_them(text: str, stop: list[str], expected: str, tokenizer: Tokenizer) -> None:
    pieces, stopped = decode_all(tokenizer, text, *stop)
    assert "".join(pieces) == expected
    assert stopped == (expected != text)


def test_what_may_become_a_stop_string_is_held_back(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer.backend, ["END"])
    assert [detokenizer.push(token) for token in tokenizer.encode("xENx")] == ["x", "", "", "ENx"]
