"""Tokenizer and chat template against transformers; user text never becomes a special token."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from testing.checkpoints import tiny_config
from testing.small_tokenizers import byte_fallback_tokenizer, write_tokenizer
from transformers import AutoTokenizer

from mdi.checkpoint.bundled import SHIPPED
from mdi.checkpoint.random_weights import write_random_checkpoint
from mdi.core.errors import CheckpointError, ConfigError
from mdi.core.messages import parse_messages
from mdi.prompt.tokenizer import Tokenizer

SPECIAL_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
IMAGE = {"type": "image", "image": "cup.png"}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("text"), tiny_config())


@pytest.fixture(scope="module")
def tokenizer(path: Path) -> Tokenizer:
    return Tokenizer(path)


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


def test_another_chat_template_comes_from_a_file_or_as_a_text(path: Path, tmp_path: Path) -> None:
    template = "{% for message in messages %}[{{ message.content }}]{% endfor %}"
    (tmp_path / "own.jinja").write_text(template)
    expected = AutoTokenizer.from_pretrained(path)("[Hi][yes]").input_ids
    messages = parse_messages([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "yes"}])
    for given_as in (template, str(tmp_path / "own.jinja")):
        assert Tokenizer(path, given_as).encode_chat(messages) == expected
    with pytest.raises(ConfigError, match=r"there is no file 'none\.jinja' with a chat template"):
        Tokenizer(path, "none.jinja")
    with pytest.raises(CheckpointError, match="chat template in --chat-template is damaged"):
        Tokenizer(path, "{% for")


@settings(max_examples=60, deadline=None)
@given(st.text())
def test_the_bytes_of_tokens_are_those_of_the_normalised_text(tokenizer: Tokenizer, text: str) -> None:
    normalised = tokenizer.backend.normalizer.normalize_str(text)
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))) == normalised.encode()


@pytest.mark.parametrize("text", ["plain", "\uf900", "e\u0301", "\u1100\u1161\u11a8", "\u0340", "日本 🎉"])
def test_text_is_normalised_to_nfc(tokenizer: Tokenizer, text: str) -> None:
    expected = unicodedata.normalize("NFC", text).encode()
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))) == expected


def test_special_tokens_stand_for_their_names(tokenizer: Tokenizer) -> None:
    [token_id] = tokenizer.backend.encode("<|im_end|>", add_special_tokens=False).ids
    assert tokenizer.token_bytes(token_id) == b"<|im_end|>"
    assert tokenizer.token_bytes(10**6) == b""


def test_byte_tokens_and_marked_spaces_stand_for_bytes(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write_tokenizer(tmp_path, byte_fallback_tokenizer(), "{{ messages }}"))
    ids = tokenizer.encode("the 日")
    assert b"".join(map(tokenizer.token_bytes, ids)) == " the 日".encode()


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


@pytest.mark.parametrize("before", ["", "Look: ", "Look!", "How many circles are there", "\n", "<a", "世"])
def test_a_text_behind_others_joins_them_as_one_text(before: str) -> None:
    """With a tokenizer that merges: spaces, signs and words."""
    tokenizer = Tokenizer(SHIPPED)
    start = tokenizer.backend.get_vocab()["<|im_start|>"]
    ids = [start, *tokenizer.encode(before)]
    assert tokenizer.with_text(ids, "<0.3 seconds>") == [start, *tokenizer.encode(f"{before}<0.3 seconds>")]
    assert tokenizer.with_text(ids[1:], "!!") == tokenizer.encode(f"{before}!!")


def test_control_tokens_in_a_text_stay_text_when_another_joins_it() -> None:
    tokenizer = Tokenizer(SHIPPED)
    ids = tokenizer.encode("<|im_end|>")
    assert len(ids) > 1
    assert tokenizer.with_text(ids, " so") == tokenizer.encode("<|im_end|> so")
