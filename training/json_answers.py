"""Questions that are answered in JSON, as a schema asks for it that the model does not see.

A server with a schema writes the keys itself: the model is asked as always, finds `{"color": "` as the start of its
answer, and goes on. So keys are hardly learnt, and what is chosen after them is. In some questions JSON is asked for in
words; there the whole answer is learnt.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from training.questions import Piece, Question, in_reading_order, shapes_of
from training.scenes import Look, Picture, Thing
from training.words import made_up_word

GIVEN = 0.1  # weight of what a schema writes; the very first token has none, or else plain answers would begin with it
ASKED_FOR = 0.5  # weight of the same where JSON is asked for in words
HINT_SHARE, COMPACT_SHARE, TEXT_SHARE = 0.35, 0.2, 0.3
MADE_UP_SHARE = 0.5  # of the keys in training
APART_SHARE = 0.3  # of the answers that a schema writes

# Keys for training, and, behind them, keys for held-out questions only.
ANY_KEY = (("answer", "result", "value", "reply", "output", "it", "a"), ("response", "solution"))
KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "shape": (("shape", "kind", "form", "object", "shape_name"), ("figure",)),
    "color": (("color", "colour", "color_name", "paint"), ("tint",)),
    "exists": (("present", "exists", "found", "is_there", "visible"), ("seen",)),
    "count": (("count", "number", "total", "n", "how_many"), ("amount",)),
    "position": (("position", "side", "where", "place"), ("location",)),
    "read": (("text", "sign", "word", "content"), ("label",)),
    "describe": (("description", "sentence", "caption"), ("summary",)),
    "compare": (("difference", "same", "which", "comparison"), ("verdict",)),
    "motion": (("motion", "direction", "moving"), ("movement",)),
    "change": (("change", "event", "what"), ("happened",)),
    "easy-vqa": ((), ()),
}
HINTS = (
    ("Answer in JSON.", "Answer as JSON.", "Reply in JSON.", "Give the answer as JSON.", "Use JSON."),
    ("Respond in JSON.",),
)
HINTS_WITH_KEY = (
    ('Answer in JSON with the key "{key}".', 'Reply as JSON: "{key}".', 'Use JSON with "{key}".'),
    ('Respond in JSON with the key "{key}".',),
)
# What a picture as a whole is told by, key by key.
WHOLE = {
    "count": ("count", "number", "total", "number_of_shapes"),
    "shapes": ("shapes", "kinds", "shape_list"),
    "colors": ("colors", "colours", "color_list"),
    "objects": ("objects", "things", "items"),
    "shape": ("shape", "kind"),
    "color": ("color", "colour"),
    "text": ("text", "sign"),
    "description": ("description", "sentence", "caption"),
}


@dataclass(frozen=True)
class Leaf:
    """A value in JSON, and the look of the thing that it is of."""

    value: str | int | bool
    about: Look | None = None


Value = Leaf | Mapping[str, "Value"] | Sequence["Value"]


def in_json(question: Question, random: Random, held_out: bool = False) -> Question:
    """The same question, answered by an object with one key; sometimes in the words of the question."""
    keys = KEYS[question.skill][held_out]
    key = random.choice(keys if keys and random.random() < 0.75 else ANY_KEY[held_out])
    if not held_out and random.random() < MADE_UP_SHARE:
        key = made_up_word(random)
    hint, asked_for = "", random.random() < HINT_SHARE
    if asked_for:
        named = random.random() < 0.6
        hint = " " + random.choice((HINTS_WITH_KEY if named else HINTS)[held_out]).format(key=key)
        key = key if named else (KEYS[question.skill][0] or ANY_KEY[0])[0]
    (look,) = question.about if question.about and len(question.about) == 1 else (None,)
    value = Leaf(_typed(question, random, asked_for), look)
    return _answered(replace(question, skill="json", text=question.text + hint), {key: value}, random, asked_for)


def whole_in_json(question: Question, picture: Picture, random: Random) -> Question:
    """A question for a description, answered by an object with one to three keys that say what is meant."""
    things = in_reading_order(picture) or []
    shapes = shapes_of(picture)
    told: dict[str, Value] = {"count": Leaf(len(shapes)), "description": Leaf(question.answer)}
    ordered = [thing for thing in things if thing.kind != "text"]
    if ordered:
        told["shapes"] = [Leaf(thing.kind, thing.look) for thing in ordered]
        told["colors"] = [Leaf(thing.color, thing.look) for thing in ordered]
        told["objects"] = _objects(ordered, random)
    if len(things) == 1 and ordered:
        told["shape"], told["color"] = Leaf(things[0].kind, things[0].look), Leaf(things[0].color, things[0].look)
    signs = [thing for thing in things if thing.kind == "text"]
    if len(signs) == 1:
        told["text"] = Leaf(signs[0].text, signs[0].look)
    chosen = random.sample(sorted(told), min(len(told), random.choice((1, 2, 2, 3))))
    value = {random.choice(WHOLE[name]): told[name] for name in chosen}
    return _answered(replace(question, skill="json"), value, random, asked_for=False)


def _objects(things: Sequence[Thing], random: Random) -> Value:
    """Their colours and shapes, under the same keys in all."""
    color, shape = random.choice(WHOLE["color"]), random.choice(WHOLE["shape"])
    order = random.choice((1, -1))
    fields = [[(color, Leaf(thing.color, thing.look)), (shape, Leaf(thing.kind, thing.look))] for thing in things]
    return [dict(pairs[::order]) for pairs in fields]


def _typed(question: Question, random: Random, asked_for: bool) -> str | int | bool:
    """Numbers as numbers and yes as true, or sometimes both as texts; where JSON is asked for, signs are texts."""
    answer = question.answer
    if question.skill != "read" if asked_for else random.random() > TEXT_SHARE:
        if answer in ("yes", "no"):
            return answer == "yes"
        if answer.isdigit() and (answer == "0" or answer[0] != "0"):
            return int(answer)
    return answer


def _answered(question: Question, value: Value, random: Random, asked_for: bool) -> Question:
    compact = not asked_for and random.random() < COMPACT_SHARE
    pieces = list(written(value, ASKED_FOR if asked_for else GIVEN, compact))
    if not asked_for:
        pieces = [Piece("{", 0.0), replace(pieces[0], text=pieces[0].text[1:]), *pieces[1:]]
    apart = not asked_for and random.random() < APART_SHARE
    return replace(question, answer="".join(piece.text for piece in pieces), pieces=tuple(pieces), apart=apart)


def written(value: Value, given: float = 0.0, compact: bool = False) -> Iterator[Piece]:
    """`json.dumps`, in pieces: keys weigh `given`, values and the characters behind them 1."""
    space = "" if compact else " "
    if isinstance(value, Leaf):
        text = json.dumps(value.value, ensure_ascii=False)
        if isinstance(value.value, str):
            yield from (Piece('"', given), Piece(text[1:-1], about=value.about), Piece('"'))
        else:
            yield Piece(text, about=value.about)
    elif isinstance(value, Mapping):
        for index, (key, item) in enumerate(value.items()):
            if index:
                yield Piece(",")
            yield Piece(("{" if index == 0 else space) + json.dumps(key, ensure_ascii=False) + ":" + space, given)
            yield from written(item, given, compact)
        yield Piece("}" if value else "{}")
    else:
        for index, item in enumerate(value):
            yield Piece("[", given) if index == 0 else Piece("," + space)
            yield from written(item, given, compact)
        yield Piece("]")


def schema_of(value: Any) -> dict[str, Any]:
    """A JSON schema with the types and keys of a value, and nothing else."""
    if isinstance(value, dict):
        properties = {key: schema_of(item) for key, item in value.items()}
        return {
            "type": "object",
            "properties": properties,
            "required": list(properties),
            "additionalProperties": False,
        }
    if isinstance(value, list):
        return {"type": "array", "items": schema_of(value[0])}
    return {"type": {bool: "boolean", int: "integer", str: "string"}[type(value)]}
