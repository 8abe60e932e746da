"""Pieces of text to typed parts."""

from __future__ import annotations

import pytest
from testing.fakes import piece

from mdi.core.batch import Token
from mdi.core.outputs import FinishReason, Piece, Sample
from mdi.gateway.answer_parts import (
    AnswerReader,
    ArgumentsDelta,
    CallStart,
    Finish,
    ReasoningDelta,
    TextDelta,
    collected,
)
from mdi.tools.syntax import SYNTAXES

TOKEN = Token(1, 0.0)


def test_text_is_one_part_for_each_piece_and_the_end_is_a_part_of_its_own() -> None:
    reader = AnswerReader()
    assert reader.parts(piece("Hel")) == [TextDelta(0, "Hel", (TOKEN,))]
    assert reader.parts(piece("lo", "stop")) == [TextDelta(0, "lo", (TOKEN,)), Finish(0, "stop")]


def test_every_token_is_in_one_part() -> None:
    reader = AnswerReader()
    assert reader.parts(Piece(1, "", (TOKEN, TOKEN))) == []
    assert reader.parts(Piece(1, "a", (TOKEN,))) == [TextDelta(1, "a", (TOKEN, TOKEN, TOKEN))]
    assert reader.parts(Piece(1, "", (TOKEN,), "length")) == [Finish(1, "length", (TOKEN,))]


def test_a_whole_answer_is_its_parts_together() -> None:
    answer = AnswerReader().whole(0, Sample("Hello", (TOKEN, TOKEN), "length"))
    assert (answer.text, answer.calls, answer.reason, answer.tokens) == ("Hello", (), "length", (TOKEN, TOKEN))


def test_thoughts_calls_and_text_are_parts_of_their_own() -> None:
    reader = AnswerReader("hermes", ["get"], thoughts=("<think>", "</think>"))
    texts = ["<think>", "Hm.", "</think>", "\n\n", "I look.", "\n<tool_call>", '\n{"name": "get", "arguments": {', "}}"]
    parts = [part for text in texts for part in reader.parts(piece(text))]
    parts += reader.parts(piece("\n</tool_call>", "stop"))
    answer = collected(parts)
    assert [type(part) for part in parts] == [
        ReasoningDelta,
        TextDelta,
        CallStart,
        ArgumentsDelta,
        ArgumentsDelta,
        Finish,
    ]
    assert (answer.text, answer.reasoning, answer.reason) == ("I look.", "Hm.", "tool_calls")
    assert [(call.name, call.arguments) for call in answer.calls] == [("get", "{}")]
    assert (reader.reasoning_tokens, len(answer.tokens)) == (3, 9)


@pytest.mark.parametrize(
    ("text", "named", "end", "reason"),
    [
        ('{"a": 1}}\n</tool_call>', False, "stop", "tool_calls"),
        ('{"a": 1}}\n</tool_call>', True, "stop", "stop"),
        ('{"a": 1}}\n</tool_call>', False, "length", "length"),
        ('{"a": ', False, "length", "length"),
        ('{"a": ', False, "stop", "stop"),
    ],
)
def test_the_reason_says_whether_calls_are_whole(text: str, named: bool, end: FinishReason, reason: str) -> None:
    reader = AnswerReader("hermes", ["get"], named=named)
    answer = reader.whole(0, Sample('<tool_call>\n{"name": "get", "arguments": ' + text, (), end))
    assert answer.reason == reason
    assert len(answer.calls) == 1


def test_samples_are_read_apart_and_ids_are_unique() -> None:
    reader = AnswerReader("hermes", ["get"])
    call = SYNTAXES["hermes"].written([("get", "{}"), ("get", "{}")])
    for start in (0, 10):
        for index in (0, 1):
            reader.parts(Piece(index, call[start : start + 10], ()))
    ends = [reader.parts(Piece(index, call[20:], (), "stop")) for index in (0, 1)]
    ids = {part.id for parts in ends for part in parts if isinstance(part, CallStart)}
    assert len(ids) == 4
    assert all(name.startswith("call_") for name in ids)
