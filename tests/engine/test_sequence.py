"""One sample's state: what it takes from a slice, when it ends, and which pieces it gives."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from mdi.core.batch import Token, token_bits
from mdi.core.sampling import SamplingParams
from mdi.engine.sequence import Request, SeenTokens, Sequence, detokenizer_of
from mdi.engine.stream import Stream
from mdi.prompt.assembly import Prompt
from mdi.prompt.tokenizer import Thoughts

END = 256
PROMPT = Prompt((104, 105), torch.arange(2).repeat(3, 1), delta=0, media=())


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> Tokenizer:
    return Tokenizer.from_file(str(tiny_checkpoint / "tokenizer.json"))


def sequence_of(tokenizer: Tokenizer, **params: Any) -> Sequence:
    sampling = SamplingParams(**params).resolved(SamplingParams(), longest=100)
    request = Request(Stream(lambda: None), sampling, PROMPT)
    detokenizer = detokenizer_of(sampling, tokenizer)
    return Sequence(request, 0, PROMPT, detokenizer, sampling.max_tokens, frozenset({END}))


def tokens(text: str, *more: int) -> tuple[Token, ...]:
    return tuple(Token(token_id, -0.5) for token_id in (*text.encode(), *more))


@pytest.mark.parametrize(
    ("params", "drawn", "text", "n_tokens", "reason"),
    [
        ({}, tokens("abc"), "abc", 3, None),
        ({}, tokens("ab", END, 99), "ab", 3, "stop"),
        ({"max_tokens": 2}, tokens("abc"), "ab", 2, "length"),
        ({"stop": "b"}, tokens("abc"), "a", 2, "stop"),
        ({"stop": "bcd"}, tokens("abc"), "a", 3, None),
    ],
)
def test_several_tokens_are_taken_up_to_the_first_that_ends_the_answer(
    tokenizer: Tokenizer, params: dict[str, Any], drawn: tuple[Token, ...], text: str, n_tokens: int, reason: str | None
) -> None:
    before_s = time.perf_counter()
    sequence = sequence_of(tokenizer, **params)
    piece = sequence.append(drawn)
    assert piece
    assert (piece.text, piece.finish_reason) == (text, reason)
    assert piece.tokens == drawn[:n_tokens]
    assert all(before_s <= token.time_s <= time.perf_counter() for token in piece.tokens)
    assert sequence.generated == [token.id for token in drawn[:n_tokens]]
    assert sequence.length == sequence.remaining == len(PROMPT.token_ids) + n_tokens
    assert sequence.finished == (reason is not None)


def test_tokens_without_certain_text_come_with_the_next_piece(tokenizer: Tokenizer) -> None:
    sequence = sequence_of(tokenizer)
    first, *rest = tokens("日")
    assert sequence.append([first]) is None
    piece = sequence.append(rest)
    assert piece
    assert piece.text == "日"
    assert piece.tokens == (first, *rest)


@given(st.lists(st.integers(0, 70)), st.lists(st.integers(0, 90)))
def test_tokens_that_were_seen_are_counted_as_they_come(prompt: list[int], answer: list[int]) -> None:
    seen = SeenTokens(prompt)
    for token in answer:
        seen.add(token)
    assert seen.bits == token_bits([*prompt, *answer])
    assert dict(zip(seen.ids, seen.counts, strict=True)) == {token: answer.count(token) for token in answer}


@pytest.mark.parametrize(("opened", "first"), [(True, ""), (False, "<think>")])
def test_a_rule_holds_behind_the_thoughts_of_each_sample(tokenizer: Tokenizer, opened: bool, first: str) -> None:
    """The engine knows from the prompt whether thoughts are open; ends are forbidden in them."""
    think, thought = 300, 301
    prompt = replace(PROMPT, thoughts=Thoughts(opened, (think, thought)))
    request = Request(Stream(lambda: None), SamplingParams(n=2).resolved(SamplingParams(), 100), rule=OnlyA())
    request.set_prompt(prompt, tokenizer, frozenset({END}), 100)
    assert request.stream.opens_thought is opened
    for sequence in request.sequences:
        if first:
            sequence.append((Token(think, 0.0),))
        mask = sequence.sampling().token_mask
        assert mask
        assert (mask[ord("b") // 8] >> ord("b") % 8 & 1, mask[END // 8] >> END % 8 & 1) == (1, 0)
        sequence.append(tokens("b", thought))
        assert sequence.sampling().token_mask == OnlyA().mask((), may_end=True)


class OnlyA:
    """A rule that allows one letter."""

    complete = False

    def copy(self) -> Self:
        return self

    def push(self, token_id: int) -> None:
        assert token_id == ord("a")

    def mask(self, end_ids: Iterable[int], *, may_end: bool) -> bytes:
        return bytes(token_bits(b"a")).ljust(40, b"\0")
