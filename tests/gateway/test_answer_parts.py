"""Pieces of text to typed parts."""

from __future__ import annotations

from testing.fakes import piece

from mdi.core.batch import Token
from mdi.core.outputs import Piece, Sample
from mdi.gateway.answer_parts import AnswerReader, Finish, TextDelta

TOKEN = Token(1, 0.0)


def test_text_is_one_part_for_each_piece_and_the_end_is_a_part_of_its_own() -> None:
    reader = AnswerReader()
    assert reader.parts(piece("Hel")) == [TextDelta(0, "Hel", (TOKEN,))]
    assert reader.parts(piece("lo", "stop")) == [TextDelta(0, "lo", (TOKEN,)), Finish(0, "stop")]


def test_every_token_is_in_one_part() -> None:
    reader = AnswerReader()
    assert reader.parts(Piece(1, "", (TOKEN, TOKEN))) == [TextDelta(1, "", (TOKEN, TOKEN))]
    assert reader.parts(Piece(1, "", (TOKEN,), "length")) == [Finish(1, "length", (TOKEN,))]


def test_a_whole_answer_is_its_parts_together() -> None:
    answer = AnswerReader().whole(0, Sample("Hello", (TOKEN, TOKEN), "length"))
    assert (answer.text, answer.calls, answer.reason, answer.tokens) == ("Hello", (), "length", (TOKEN, TOKEN))
