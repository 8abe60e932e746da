"""Text token by token: whole characters only, stop strings cut, and nothing lost at the end."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdi.prompt.detokenizer import Detokenizer
from mdi.prompt.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> Tokenizer:
    return Tokenizer(tiny_checkpoint)


def decode_all(tokenizer: Tokenizer, text: str, *stop: str) -> tuple[list[str], bool]:
    """Pieces as they become certain, one per token and the rest, and whether a stop string was met."""
    detokenizer = Detokenizer(tokenizer.backend, stop)
    pieces = []
    for token in tokenizer.encode(text):
        pieces.append(detokenizer.push(token))
        if detokenizer.stopped_by:
            break
    return [*pieces, detokenizer.finish()], detokenizer.stopped_by is not None


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


@pytest.mark.parametrize("skip", [True, False])
def test_marks_are_shown_though_other_special_tokens_are_not(tokenizer: Tokenizer, skip: bool) -> None:
    mark, other = tokenizer.backend.get_vocab()["<|im_start|>"], tokenizer.backend.get_vocab()["<|im_end|>"]
    detokenizer = Detokenizer(tokenizer.backend, skip_special_tokens=skip, marks=frozenset({mark}))
    first, rest = "é".encode()
    ids = [*tokenizer.encode("a"), first, mark, rest, *tokenizer.encode(" b"), other, mark]
    text = "".join([*map(detokenizer.push, ids), detokenizer.finish()])
    shown = "" if skip else "<|im_end|>"
    assert text == f"a\ufffd<|im_start|>\ufffd b{shown}<|im_start|>"


def test_a_stop_string_may_stand_behind_a_mark(tokenizer: Tokenizer) -> None:
    mark = tokenizer.backend.get_vocab()["<|im_start|>"]
    detokenizer = Detokenizer(tokenizer.backend, (">ab",), marks=frozenset({mark}))
    text = "".join(map(detokenizer.push, [mark, *tokenizer.encode("abc")])) + detokenizer.finish()
    assert (text, detokenizer.stopped_by) == ("<|im_start|", ">ab")
