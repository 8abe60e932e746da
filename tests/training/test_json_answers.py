"""Answers in JSON: true, as `json.dumps` writes them, and learnt where a schema does not write them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from random import Random
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from training.held_out import json_exams
from training.json_answers import ANY_KEY, HINTS, HINTS_WITH_KEY, KEYS, Leaf, Value, in_json, whole_in_json, written
from training.layout import Plan
from training.questions import SKILLS, Asker, Question
from training.samples import BatchMaker
from training.scenes import Picture, SceneMaker
from training.tokens import IGNORED, ChatTokens

PLAIN = st.recursive(
    st.text() | st.integers() | st.booleans(),
    lambda values: (
        st.lists(values, min_size=1, max_size=3) | st.dictionaries(st.text(), values, min_size=1, max_size=3)
    ),
    max_leaves=8,
)


def asked(kind: str, count: int = 60) -> Iterator[tuple[Question, Picture]]:
    """Questions about scenes of a kind, in words."""
    for index in range(count):
        maker = SceneMaker(f"json {kind} {index}")
        scene = maker.film(112, 84, 4) if kind == "film" else getattr(maker, kind)(112, 84)
        for question in Asker(maker.random).questions(scene, 6):
            if question.skill != "strange":
                yield question, scene.pictures[0]


@given(PLAIN, st.booleans())
def test_pieces_are_what_json_dumps_writes(plain: Any, compact: bool) -> None:
    text = "".join(piece.text for piece in written(_leaves(plain), compact=compact))
    assert text == json.dumps(plain, ensure_ascii=False, separators=(",", ":") if compact else (", ", ": "))


def _leaves(plain: Any) -> Value:
    if isinstance(plain, dict):
        return {key: _leaves(item) for key, item in plain.items()}
    return list(map(_leaves, plain)) if isinstance(plain, list) else Leaf(plain)


@pytest.mark.parametrize("kind", ["still", "text", "pair", "film"])
def test_the_one_value_is_the_plain_answer(kind: str) -> None:
    for index, (question, _) in enumerate(asked(kind)):
        answered = in_json(question, Random(index))
        assert answered.answer == "".join(piece.text for piece in answered.pieces)
        (value,) = json.loads(answered.answer).values()
        assert (
            {True: "yes", False: "no"}[value] == question.answer
            if value is True or value is False
            else (str(value) == question.answer)
        )


def test_a_whole_picture_is_told_under_the_keys_that_say_what_is_meant() -> None:
    told = 0
    for index, (question, picture) in enumerate(asked("still", 150)):
        if question.skill != "describe":
            continue
        shapes = [thing for thing in sorted(picture.things, key=lambda thing: thing.x) if thing.kind != "text"]
        value = json.loads(whole_in_json(question, picture, Random(index)).answer)
        if "shapes" in value:
            told += 1
            assert value["shapes"] == [thing.kind for thing in shapes]
        for objects in (value[key] for key in ("objects", "things", "items") if key in value):
            told += 1
            assert [set(item.values()) for item in objects] == [{thing.color, thing.kind} for thing in shapes]
        if "count" in value:
            told += 1
            assert value["count"] == len(shapes)
    assert told > 20


def test_only_what_a_schema_does_not_write_weighs_in_full() -> None:
    (pieces,) = [in_json(Question("color", "What color?", "red"), _never_in_words()).pieces]
    weights = {piece.text: piece.weight for piece in pieces}
    assert pieces[0].text == "{"
    assert pieces[0].weight == 0  # or else plain answers would begin with it
    assert weights["red"] == 1
    assert all(weight < 0.5 for text, weight in weights.items() if ":" in text)


def _never_in_words() -> Random:
    """Draws of one half: no hint, the spaced form."""
    random = Random(0)
    random.random = lambda: 0.5  # type: ignore[method-assign]
    return random


def test_a_batch_scores_what_the_model_chooses(maker: BatchMaker, tokens: ChatTokens) -> None:
    """Of `{"color": "red"}` that is `red`, what follows it, and the end."""
    batch = maker(6, Plan("still", (4, 4), 1, 24, json_share=1.0))
    judged = 0
    for row, questions in enumerate(batch.questions):
        for number, question in enumerate(questions):
            chosen = batch.labels[row][batch.numbers[row] == number].tolist()
            assert IGNORED not in chosen
            if question.skill == "json" and len(keys := json.loads(question.answer)) == 1:
                text = tokens.decode(chosen)
                (value,) = keys.values()
                if isinstance(value, str) and value.islower() and " " not in value:
                    judged += 1
                    assert text == value + '"}'
    assert judged > 10


def test_parts_that_stand_apart_are_the_same_text_in_other_tokens(tokens: ChatTokens) -> None:
    """Where a schema wants a text, a model that began a number has a space of its own before the quotation mark."""
    apart = [
        answered
        for index, (question, _) in enumerate(asked("still"))
        if (answered := in_json(question, Random(index))).apart
    ]
    assert len(apart) > 20
    for question in apart:
        split, whole = (tokens.answer(texts) for texts in (question.texts, [question.answer]))
        assert tokens.decode(split) == tokens.decode(whole) == question.answer
        firsts, lasts = tokens.first_characters(question.texts), tokens.last_characters(question.texts)
        assert firsts == [0, *(last + 1 for last in lasts[:-1])]
        assert lasts[-1] == len(question.answer) - 1
    assert any(tokens.answer(question.texts) != tokens.answer([question.answer]) for question in apart)


def test_keys_in_training_are_mostly_unknown_words() -> None:
    keys = [
        next(iter(json.loads(in_json(question, Random(i)).answer))) for i, (question, _) in enumerate(asked("still"))
    ]
    known = {key for pair in (ANY_KEY, *KEYS.values()) for key in pair[0]}
    assert 0.35 < sum(key not in known for key in keys) / len(keys) < 0.65


def test_held_out_questions_have_keys_and_words_of_their_own() -> None:
    for training, held_out in (ANY_KEY, HINTS, HINTS_WITH_KEY, *KEYS.values()):
        assert not set(training) & set(held_out)


def test_the_exam_asks_for_what_its_schema_allows() -> None:
    found = list(json_exams(len(SKILLS)))
    for exam in found:
        assert exam.schema is not None
        jsonschema.validate(json.loads(exam.question.answer), exam.schema)
        assert exam.right(
            exam.question.answer.replace(" ", "") if " " not in exam.question.text else exam.question.answer
        )
        assert not exam.right("{")
    assert len({exam.question.text for exam in found}) > 5
