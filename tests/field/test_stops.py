"""Where an answer's text ends, and what it shows: stop strings, special tokens, broken bytes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from testing.small_tokenizers import byte_fallback_tokenizer, prefixless_tokenizer
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from mdi import Engine, SamplingParams
from mdi.core.errors import InputError
from mdi.core.sampling import MAX_STOP_CHARACTERS
from mdi.prompt.detokenizer import Detokenizer
from mdi.prompt.tokenizer import Tokenizer

A, B = b"ab"


@pytest.fixture(scope="module")
def backend(tiny_checkpoint: Path) -> Backend:
    return Tokenizer(tiny_checkpoint).backend


@pytest.fixture(scope="module")
def theirs(tiny_checkpoint: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_checkpoint)


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: Path) -> Iterator[Engine]:
    with Engine(tiny_checkpoint, dtype="float32", sequence_length=256) as engine:
        yield engine


def forced(token_id: int, **params: Any) -> SamplingParams:
    """Every token of the answer is this one."""
    return SamplingParams(temperature=0, logit_bias={token_id: 100}, **params)


@pytest.mark.parametrize(("least", "n_tokens"), [(0, 1), (1, 2), (8, 9)])
def test_a_stop_string_ends_the_answer_after_the_least_number_of_tokens(
    engine: Engine, least: int, n_tokens: int
) -> None:
    """C14: these tokens stay, and the first stop string after them ends the answer."""
    answer = engine.chat("Say a.", forced(A, stop="a", min_tokens=least, max_tokens=20))
    assert (answer.text, answer.finish_reason) == ("a" * least, "stop")
    assert len(answer.token_ids) == n_tokens


def test_a_stop_string_may_begin_within_the_least_number_of_tokens(backend: Backend) -> None:
    """C14: it counts where it ends."""
    detokenizer = Detokenizer(backend, ["ab"], min_tokens=3)
    assert [detokenizer.push(token) for token in b"abab"] == ["", "ab", "", ""]
    assert detokenizer.stopped_by == "ab"


def stopped_text(text: str, stop: Sequence[str], least: int) -> str:
    """The text that a stop string leaves of a text of one token a character."""
    for end in range(least + 1, len(text) + 1):
        if found := [string for string in stop if text[:end].endswith(string)]:
            return text[: end - max(map(len, found))]
    return text


def held_back(text: str, stop: Sequence[str]) -> int:
    """How long the end of a text is that could start a stop string."""
    starts = {string[:length] for string in stop for length in range(len(string))}
    return max((length for length in range(1, len(text) + 1) if text[-length:] in starts), default=0)


FEW_LETTERS = st.text("ab", max_size=30)
STOP_STRINGS = st.lists(st.text("ab", min_size=1, max_size=6), max_size=4)


@settings(max_examples=300, deadline=None)
@given(text=FEW_LETTERS, stop=STOP_STRINGS, least=st.integers(0, 12))
def test_what_is_shown_of_a_text_is_what_a_plain_search_gives(
    backend: Backend, text: str, stop: list[str], least: int
) -> None:
    """C14, D5: nothing is shown early, late, twice or never."""
    detokenizer = Detokenizer(backend, stop, min_tokens=least)
    shown, expected = "", stopped_text(text, stop, least)
    for end, token in enumerate(text.encode(), 1):
        shown += detokenizer.push(token)
        if detokenizer.stopped_by:
            break
        assert shown == text[: end - held_back(text[:end], stop)]
    assert (detokenizer.stopped_by is not None) == (expected != text)
    assert shown + detokenizer.finish() == expected


@pytest.mark.parametrize(
    "stop",
    [
        ["a" * (MAX_STOP_CHARACTERS - 1) + "b"] * 16,
        ["ab" * (MAX_STOP_CHARACTERS // 2 - 1) + "c"] * 16,
        ["a" * n + "b" for n in range(MAX_STOP_CHARACTERS - 16, MAX_STOP_CHARACTERS)],
    ],
)
def test_long_stop_strings_cost_as_little_as_short_ones(backend: Backend, stop: list[str]) -> None:
    """D5: comparing each with the text's end would take minutes here."""
    detokenizer = Detokenizer(backend, stop)
    before_s = time.perf_counter()
    for token in (A, A, B, A) * 5000:
        detokenizer.push(token)
    assert time.perf_counter() - before_s < 30


def test_a_stop_string_has_a_longest_length() -> None:
    """D5: the refusal names the string."""
    assert SamplingParams(stop=["x" * MAX_STOP_CHARACTERS])
    with pytest.raises(InputError, match=r"stop\[1\] has 4097 characters.*at most 4096") as refused:
        SamplingParams(stop=["x", "x" * (MAX_STOP_CHARACTERS + 1)])
    assert refused.value.field == "stop[1]"


BYTES_AND_SPECIALS = st.lists(st.one_of(st.integers(0, 263), st.sampled_from(list("é日🎉".encode()))), max_size=40)


@settings(max_examples=200, deadline=None)
@given(ids=BYTES_AND_SPECIALS, skip=st.booleans())
def test_the_text_is_what_transformers_decodes(theirs: Any, ids: list[int], skip: bool) -> None:
    """C6: special tokens are shown, or not, as in transformers; broken bytes, too."""
    detokenizer = Detokenizer(theirs.backend_tokenizer, skip_special_tokens=skip)
    shown = "".join(map(detokenizer.push, ids)) + detokenizer.finish()
    assert shown == theirs.decode(ids, skip_special_tokens=skip)


def test_an_answer_shows_its_special_tokens_on_request(engine: Engine, theirs: Any) -> None:
    """C6: Qwen-VL marks boxes with special tokens."""
    vision_start = 259
    plain, shown = (
        engine.chat("Where?", forced(vision_start, max_tokens=3, skip_special_tokens=skip)) for skip in (True, False)
    )
    assert plain.token_ids == shown.token_ids
    assert plain.text == ""
    assert shown.text == theirs.decode(shown.token_ids, skip_special_tokens=False) == "<|vision_start|>" * 3


TEXTS = st.text("a é日🎉\n", max_size=12)


@settings(max_examples=200, deadline=None)
@given(text=TEXTS, make=st.sampled_from([byte_fallback_tokenizer, prefixless_tokenizer]))
def test_text_of_a_byte_fallback_tokenizer_survives_token_by_token(text: str, make: Callable[[], Backend]) -> None:
    """C6: spaces as well, of which such a decoder may drop the first."""
    backend = make()
    ids = backend.encode(text, add_special_tokens=False).ids
    detokenizer = Detokenizer(backend)
    assert "".join(map(detokenizer.push, ids)) + detokenizer.finish() == backend.decode(ids)


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 300), max_size=30))
def test_no_answer_ends_the_engine_by_its_bytes(ids: list[int]) -> None:
    """B1: with byte fallback, a broken byte turns whole characters before it into broken ones."""
    backend = byte_fallback_tokenizer()
    detokenizer = Detokenizer(backend)
    shown = "".join(map(detokenizer.push, ids)) + detokenizer.finish()
    assert isinstance(shown, str)


def test_whole_characters_before_a_broken_byte_stay() -> None:
    """B1: text that was sent is never taken back."""
    backend = byte_fallback_tokenizer()
    detokenizer = Detokenizer(backend)
    vocabulary = backend.get_vocab()
    shown = [detokenizer.push(vocabulary[piece]) for piece in ("<0xE6>", "<0x97>", "<0xA5>", "<0xFF>", "a")]
    assert shown[:4] == ["", "", "日", ""]
    assert shown[4].endswith("a")


def test_an_answer_of_broken_bytes_is_not_decoded_again_and_again(backend: Backend) -> None:
    """D5: the cost of a token does not grow with the broken bytes before it."""
    detokenizer = Detokenizer(backend)
    shown = [detokenizer.push(0xFF) for _ in range(1000)]
    assert sum(map(len, shown)) == 999
    assert detokenizer.finish() == "\ufffd"
