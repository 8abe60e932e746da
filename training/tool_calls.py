"""Tools, requests that one of them fits, the calls, their results, and what is said then.

A request is fitted by the tool that has its verb, or its noun: whether a model calls depends on the list of tools, and
what it calls with on the picture. Where no tool fits, it says so; questions that need none are answered as always.
"""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from training.json_answers import Leaf, written
from training.questions import Asker, Piece, Question, plural, shapes_of
from training.scenes import Picture, Scene, Thing
from training.tokens import CALLS
from training.unknown import UNKNOWN
from training.words import made_up_word

CANNOT = "I have no tool for that."
DONE, FAILED = "It is done.", "It did not work."
MOST_TOOLS = 3
MADE_UP_SHARE = 0.6  # of verbs, nouns and arguments in training: few real ones would be learnt by heart
NAME_WEIGHT = 0.5  # of names in a call: a grammar writes most of them

# For training, and, behind them, for held-out requests only.
Split = tuple[tuple[str, ...], tuple[str, ...]]
ACT: Split = (
    ("move to", "go to", "drive to", "pick up", "touch", "push", "select", "mark", "point at", "open", "lift", "take",
     "hide", "press", "remove", "find", "fly to", "jump to", "hold", "drop", "watch", "cut out"),
    ("walk to", "grab", "turn to", "hit"),
)  # fmt: skip
TELL: Split = (
    ("report", "log", "save", "send", "store", "write down", "print", "post", "note", "share"),
    ("record", "show"),
)
PAINT: Split = (
    ("lamp", "wall", "screen", "door", "roof", "box", "car", "sky", "desk", "floor"),
    ("light", "window"),
)
LOOK_UP: Split = (
    ("price", "weight", "owner", "age", "code", "name", "size", "cost", "rank", "score", "label", "height", "stock"),
    ("value", "maker"),
)
ROLES: dict[str, Split] = {
    "color": (("color", "colour", "hue", "color_name"), ("tint",)),
    "shape": (("shape", "kind", "form", "object"), ("figure",)),
    "count": (("count", "number", "total", "n"), ("amount",)),
    "text": (("text", "content", "sign", "words"), ("message",)),
}
DESCRIPTIONS = {
    "color": ("a color", "its color", "the color"), "shape": ("a shape", "its shape", "which shape"),
    "count": ("how many", "the number"), "text": ("the text", "what it says"),
}  # fmt: skip
DESCRIBED_SHARE = 0.4  # of the arguments in training; held-out names say nothing by themselves, so all have one
TYPES = {"count": "integer"}
ACT_REQUESTS: Split = (
    ("{verb} {the}.", "Please {verb} {the}.", "Can you {verb} {the}?", "Now {verb} {the}.",
     "I want you to {verb} {the}.", "{verb} {the}, please.", "You should {verb} {the}."),
    ("Could you {verb} {the}?", "Please {verb} {the} now."),
)  # fmt: skip
COUNT_REQUESTS: Split = (
    ("{verb} how many {things} there are.", "{verb} the number of {things}.", "Count the {things} and {verb} it.",
     "Please {verb} how many {things} you see."),
    ("Please {verb} the number of {things}.",),
)  # fmt: skip
READ_REQUESTS: Split = (
    (
        "{verb} what the sign says.",
        "{verb} the text.",
        "Read the text and {verb} it.",
        "Please {verb} what is written.",
    ),
    ("Please {verb} what the text says.",),
)
PAINT_REQUESTS: Split = (
    ("Paint the {noun} like {the}.", "Give the {noun} the color of {the}.", "Make the {noun} the color of {the}.",
     "The {noun} should have the color of {the}."),
    ("Please paint the {noun} like {the}.",),
)  # fmt: skip
LOOK_UP_REQUESTS: Split = (
    ("What is the {noun} of {the}?", "Look up the {noun} of {the}.", "Which {noun} has {the}?",
     "Tell me the {noun} of {the}.", "I need the {noun} of {the}."),
    ("Please look up the {noun} of {the}.",),
)  # fmt: skip
SUCCESS = ('{"ok": true}', "ok", "done", '{"status": "done"}', '{"success": true}', '{"result": "ok"}', "OK", "true")
FAILURE = ('{"ok": false}', "error", "failed", '{"error": "blocked"}', '{"success": false}', '{"error": "not found"}',
           '{"result": "failed"}', "false")  # fmt: skip


@dataclass(frozen=True)
class Argument:
    """role: what of a thing it is."""

    name: str
    role: str
    description: str

    @property
    def type(self) -> str:
        return TYPES.get(self.role, "string")


@dataclass(frozen=True)
class Tool:
    """A function a client offers. family: what it does; key: the verb or noun of requests for it."""

    family: str
    key: str
    name: str
    description: str
    arguments: tuple[Argument, ...]

    def schema(self) -> dict[str, Any]:
        """In OpenAI's form, as chat templates read it."""
        properties = {
            argument.name: {"type": argument.type}
            | ({"description": argument.description} if argument.description else {})
            for argument in self.arguments
        }
        parameters = {"type": "object", "properties": properties, "required": list(properties)}
        function = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}

    def line(self) -> str:
        """As the chat template lists it."""
        arguments = ", ".join(
            f"{argument.name}: {argument.type}" + (f" ({argument.description})" if argument.description else "")
            for argument in self.arguments
        )
        return f"{self.name}({arguments}): {self.description}"


def listed(system: str, tools: Sequence[Tool]) -> str:
    """The system message, as the chat template writes it."""
    lines = "".join(f"\n{tool.line()}" for tool in tools)
    return f"{system}\n\n# Tools\n<tools>{lines}\n</tools>" if tools else system


class Workshop:
    """Draws tools, and requests about a picture; told: requests that need no look at it."""

    def __init__(self, random: Random, held_out: bool = False, told: bool = False) -> None:
        self._random = random
        self._told = told
        self._held_out = held_out
        self._asker = Asker(random, held_out)

    def tools(self) -> list[Tool]:
        """None to three, no two of the same verb or noun."""
        tools: dict[str, Tool] = {}
        for _ in range(self._random.choices(range(MOST_TOOLS + 1), (0.08, 0.36, 0.36, 0.2))[0]):
            tool = self.tool()
            tools.setdefault(tool.key, tool)
        return list(tools.values())

    def tool(self) -> Tool:
        family = self._random.choices(("act", "count", "read", "paint", "look up"), (0.4, 0.15, 0.15, 0.12, 0.18))[0]
        return {
            "act": self._act, "count": self._count, "read": self._read, "paint": self._paint, "look up": self._look_up,
        }[family]()  # fmt: skip

    def conversation(self, scene: Scene, tools: Sequence[Tool]) -> list[Question] | None:
        """A request, and, where a tool fits, what follows its result."""
        tool = self._random.choice(tools) if tools and self._random.random() < 0.75 else self.tool()
        fits = tool in tools
        if not fits and any(tool.key == other.key for other in tools):
            return None
        request = self._request(scene.pictures[0], tool)
        if request is None:
            return None
        text, values, about = request
        looks = frozenset(thing.look for thing in about)
        if not fits:
            answer = UNKNOWN if tool.family == "look up" or not tools else CANNOT
            return [Question("no tool", text, answer, looks)]
        pieces = _call(tool, values, about)
        call = Question(
            "told" if self._told else "tool", text, "".join(piece.text for piece in pieces), looks, pieces=pieces
        )
        return [call, self._after(tool)]

    def _act(self) -> Tool:
        r, verb = self._random, self._key(ACT)
        name = verb.replace(" ", "_") + r.choice(("", "", "_shape", "_it"))
        roles = r.choice((("color", "shape"), ("color", "shape"), ("shape", "color"), ("shape",), ("color",)))
        return self._tool("act", verb, name, f"{_capital(verb)} a shape.", roles)

    def _count(self) -> Tool:
        r, verb = self._random, self._key(TELL)
        name = verb.replace(" ", "_") + r.choice(("_count", "_number", "_total"))
        roles = r.choice((("shape", "count"), ("count", "shape"), ("count",)))
        return self._tool("count", verb, name, f"{_capital(verb)} how many shapes there are.", roles)

    def _read(self) -> Tool:
        verb = self._key(TELL)
        name = verb.replace(" ", "_") + self._random.choice(("_text", "_sign", "_words"))
        return self._tool("read", verb, name, f"{_capital(verb)} what a sign says.", ("text",))

    def _paint(self) -> Tool:
        noun = self._key(PAINT)
        name = self._random.choice(("paint", "set", "color")) + f"_{noun}"
        return self._tool("paint", noun, name, f"Paint the {noun}.", ("color",))

    def _look_up(self) -> Tool:
        r, noun = self._random, self._key(LOOK_UP)
        roles = r.choice((("color", "shape"), ("shape", "color"), ("shape",), ("color",)))
        return self._tool("look up", noun, r.choice(("get_", "find_", "")) + noun, f"The {noun} of a shape.", roles)

    def _tool(self, family: str, key: str, name: str, description: str, roles: Sequence[str]) -> Tool:
        return Tool(family, key, name, description, tuple(map(self._argument, roles)))

    def _argument(self, role: str) -> Argument:
        made_up = self._makes_up()
        described = made_up or self._held_out or self._random.random() < DESCRIBED_SHARE
        name = made_up_word(self._random) if made_up else self._one(ROLES[role])
        return Argument(name, role, self._random.choice(DESCRIPTIONS[role]) if described else "")

    def _request(self, picture: Picture, tool: Tool) -> tuple[str, dict[str, str | int], Sequence[Thing]] | None:
        """Its text, the values by role, and the things that they are of."""
        r, verb = self._random, tool.key
        shapes = shapes_of(picture)
        signs = [thing for thing in picture.things if thing.kind == "text"]
        if self._told and tool.family in ("read", "count"):
            return None
        if tool.family == "read":
            if len(signs) != 1:
                return None
            return self._text(READ_REQUESTS, verb=verb), {"text": signs[0].text}, signs
        if tool.family == "count":
            if not shapes:
                return None
            kind = r.choice(shapes).kind
            counted = [thing for thing in shapes if thing.kind == kind]
            text = self._text(COUNT_REQUESTS, verb=verb, things=plural(kind))
            return text, {"shape": kind, "count": len(counted)}, counted
        named = [(f"the {thing.color} {thing.kind}", thing) for thing in shapes]
        if not self._told:
            named = [(name, thing) for name, thing in self._asker.named(picture) if thing.kind != "text"]
        if not named:
            return None
        the, thing = r.choice(named)
        requests = {"act": ACT_REQUESTS, "paint": PAINT_REQUESTS, "look up": LOOK_UP_REQUESTS}[tool.family]
        text = self._text(requests, verb=verb, noun=verb, the=the)
        return text, {"color": thing.color, "shape": thing.kind}, [thing]

    def _text(self, requests: Split, **names: str) -> str:
        text = self._one(requests).format(**names)
        return _capital(text) if self._random.random() < 0.85 else text[0].lower() + text[1:].rstrip("?.")

    def _key(self, split: Split) -> str:
        """A verb or noun."""
        if not self._makes_up():
            return self._one(split)
        behind = self._random.choice((" to", " up", " at")) if split is ACT and self._random.random() < 0.2 else ""
        return made_up_word(self._random) + behind

    def _makes_up(self) -> bool:
        return not self._held_out and self._random.random() < MADE_UP_SHARE

    def _one(self, split: Split) -> str:
        return self._random.choice(split[self._held_out])

    def _after(self, tool: Tool) -> Question:
        """What follows the call: the result, and the answer."""
        r = self._random
        if tool.family == "look up":
            letters = "".join(r.choices(string.ascii_uppercase, k=r.randint(1, 4)))
            value = str(r.randrange(1000)) if r.random() < 0.7 else letters
            shown = value if value.isdigit() else json.dumps(value)
            result = r.choice((value, f'{{"{tool.key}": {shown}}}', f'{{"{tool.key}": {shown}}}'))
            return after(result, f"The {tool.key} is {value}.")
        worked = r.random() < 0.7
        return after(r.choice(SUCCESS if worked else FAILURE), DONE if worked else FAILED)


def after(result: str, answer: str) -> Question:
    """The turn that follows a call: the result as the chat template writes it, and the answer in a sentence."""
    return Question("tool result", f"<tool_response>\n{result}\n</tool_response>", answer)


def read_result(text: str) -> str:
    """The result in a turn that `after` made."""
    return text.removeprefix("<tool_response>\n").removesuffix("\n</tool_response>")


def read_call(answer: str) -> dict[str, Any] | None:
    """The name and arguments of an answer that is a call."""
    begin, end = CALLS
    if not answer.startswith(begin):
        return None
    call: dict[str, Any] = json.loads(answer.removeprefix(begin).removesuffix(end))
    return call


def _call(tool: Tool, values: dict[str, str | int], about: Sequence[Thing]) -> tuple[Piece, ...]:
    """As the chat template writes a call, in pieces."""
    look = about[0].look if len({thing.look for thing in about}) == 1 else None
    arguments = {argument.name: Leaf(values[argument.role], look) for argument in tool.arguments}
    name = (Piece('\n{"name": "', NAME_WEIGHT), Piece(tool.name), Piece('", "arguments": ', NAME_WEIGHT))
    begin, end = CALLS
    return (Piece(begin), *name, *written(arguments, NAME_WEIGHT), Piece(f"}}\n{end}"))


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
