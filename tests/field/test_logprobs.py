"""Logprobs over any text: every offset points at its token's text, and the bytes are those of the text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from testing.fakes import FakeEngine

from mdi.core.batch import Token
from mdi.core.outputs import Piece, collect
from mdi.core.sampling import SamplingParams
from mdi.engine import Stream
from mdi.engine.sequence import Request
from mdi.gateway.openai.logprobs import TextLogprobs, chat_logprobs
from mdi.prompt.assembly import Prompt
from mdi.prompt.tokenizer import Tokenizer
from tests.gateway.conftest import RealServer

N_BYTES = 256  # of the tiny tokenizer's tokens are bytes; the others are special tokens
PROMPT = Prompt((0,), torch.zeros(3, 1, dtype=torch.int64), delta=0, media=())


class TinyTokens(FakeEngine):
    """The bytes of the tiny tokenizer's tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._tokenizer = tokenizer

    def token_bytes(self, token_id: int, *, skip_special_tokens: bool = False) -> bytes:
        return b"" if skip_special_tokens and token_id >= N_BYTES else self._tokenizer.token_bytes(token_id)


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> Tokenizer:
    return Tokenizer(tiny_checkpoint)


def answer(tokenizer: Tokenizer, ids: list[int], stop: list[str], skip: bool) -> list[Piece]:
    """The pieces of an answer of these tokens."""
    params = SamplingParams(stop=stop, skip_special_tokens=skip, max_tokens=len(ids), temperature=0)
    request = Request(Stream(lambda: None), params.resolved(SamplingParams(), 1000))
    request.set_prompt(PROMPT, tokenizer.backend, frozenset(), 1000)
    [sequence] = request.sequences
    pieces = []
    for token_id in ids:
        top = ((token_id, -1.0), (0xF0, -2.0), (0x9F, -3.0))
        if piece := sequence.append([Token(token_id, -1.0, top)]):
            pieces.append(piece)
        if sequence.finished:
            break
    return pieces


def naive_offsets(tokenizer: Tokenizer, ids: list[int], text: str, skip: bool) -> list[int | None]:
    """Where the first byte of every token is, found by decoding all before it; None for tokens that are not shown."""
    offsets: list[int | None] = []
    for index, token_id in enumerate(ids):
        first = tokenizer.token_bytes(token_id)[0]
        decoded = tokenizer.backend.decode([*ids[:index], first], skip_special_tokens=skip)
        hidden = skip and token_id >= N_BYTES
        offsets.append(None if hidden else min(len(decoded) - 1, len(text)))
    return offsets


TEXTS = st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from("🎉👩‍🚀é\u2028日")), max_size=8)
TOKENS = st.lists(
    st.one_of(
        TEXTS.map(lambda text: list(text.encode())),
        st.lists(st.integers(0x80, 0xFF), max_size=3),
        st.lists(st.integers(N_BYTES, N_BYTES + 7), max_size=2),
    ),
    min_size=1,
    max_size=6,
).map(lambda parts: [token for part in parts for token in part])


@settings(max_examples=150)
@example([0xED, 0xA0], [], False)  # half of a surrogate
@example([0xED, 0xA0, 0x80, 0xED, 0x9F, 0xBF], [], False)
@given(ids=TOKENS.filter(bool), stop=st.lists(TEXTS.filter(bool), max_size=2), skip=st.booleans())
def test_every_offset_points_at_its_tokens_text(
    tokenizer: Tokenizer, ids: list[int], stop: list[str], skip: bool
) -> None:
    """A15: emoji of several tokens, broken bytes, special tokens, stop strings; whole and in chunks."""
    engine, pieces = TinyTokens(tokenizer), answer(tokenizer, ids, stop, skip)
    [sample] = collect(pieces, Stream(lambda: None).usage).samples
    logprobs = TextLogprobs(engine, skip).of(0, sample)
    assert logprobs
    offsets = logprobs["text_offset"]
    naive = naive_offsets(tokenizer, ids[: len(offsets)], sample.text, skip)
    assert offsets == [offset if at is None else at for at, offset in zip(naive, offsets, strict=True)]
    assert offsets == sorted(offsets)
    assert 0 <= offsets[0] <= offsets[-1] <= len(sample.text)
    for name, offset in zip(logprobs["tokens"], offsets, strict=True):
        if sample.text[offset:].startswith(name[:1]) and len(name) == 1:
            assert sample.text[offset] == name
    streamed = TextLogprobs(engine, skip).of
    chunks = [streamed(7, piece) for piece in pieces]
    assert [offset for chunk in chunks if chunk for offset in chunk["text_offset"]] == offsets


@settings(max_examples=100)
@given(ids=TOKENS.filter(bool), skip=st.booleans())
def test_the_bytes_of_a_chat_are_those_of_its_text(tokenizer: Tokenizer, ids: list[int], skip: bool) -> None:
    """A15: chat logprobs."""
    pieces = answer(tokenizer, ids, [], skip)
    logprobs = chat_logprobs(TinyTokens(tokenizer), skip)
    entries = [entry for piece in pieces for entry in (logprobs(piece.tokens) or {})["content"]]
    joined = b"".join(bytes(entry["bytes"]) for entry in entries)
    assert joined.decode(errors="replace") == "".join(piece.text for piece in pieces)
    assert len(entries) == len(ids)


def test_byte_tokens_do_not_hide_each_other(tokenizer: Tokenizer) -> None:
    """A15: among the likeliest tokens of a completion, each has a name of its own, as OpenAI writes it."""
    pieces = answer(tokenizer, list("🎉".encode()), [], True)
    logprobs = TextLogprobs(TinyTokens(tokenizer), True).of(0, collect(pieces, Stream(lambda: None).usage).samples[0])
    assert logprobs
    assert logprobs["tokens"] == [rf"bytes:\x{byte:02x}" for byte in "🎉".encode()]
    assert logprobs["text_offset"] == [0, 0, 0, 0]
    assert logprobs["top_logprobs"][2] == {r"bytes:\x8e": -1.0, r"bytes:\xf0": -2.0, r"bytes:\x9f": -3.0}


def data_of(name: str) -> bytes:
    """The bytes behind the name of a completion's token."""
    return bytes.fromhex(name.removeprefix("bytes:").replace(r"\x", "")) if name.startswith("bytes:") else name.encode()


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("stop", [None, ["a", "\ufffd\ufffd"]])
def test_offsets_hold_through_the_official_client(tiny: RealServer, skip: bool, stop: Any) -> None:
    """A15: several prompts and samples, whole and streamed; at temperature 2 a byte model writes all kinds of text."""
    ask: dict[str, Any] = {"model": "tiny", "prompt": ["a", "🎉"], "n": 2, "max_tokens": 40, "temperature": 2.0}
    ask |= {"seed": 5, "logprobs": 2, "stop": stop, "extra_body": {"skip_special_tokens": skip, "ignore_eos": True}}
    with tiny.client as client:
        whole = client.completions.create(**ask).choices
        chunks = [chunk.choices[0] for chunk in client.completions.create(**ask, stream=True)]
    for choice in whole:
        assert choice.logprobs
        names, offsets = choice.logprobs.tokens or [], choice.logprobs.text_offset or []
        parts = [b"" if skip and name.startswith("<|") else data_of(name) for name in names]
        before = b""
        for part, offset in zip(parts, offsets, strict=True):
            if part:
                naive = len((before + part[:1]).decode(errors="replace")) - 1
                assert offset == min(naive, len(choice.text))
            before += part
        assert before.decode(errors="replace").startswith(choice.text)
        mine = [chunk for chunk in chunks if chunk.index == choice.index]
        assert "".join(chunk.text for chunk in mine) == choice.text
        streamed = [at for chunk in mine if chunk.logprobs for at in chunk.logprobs.text_offset or []]
        assert streamed == offsets
