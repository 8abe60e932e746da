"""Grammars of calls: whatever a model prefers, its calls are of the tools and their arguments fit the schemas."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from typing import Any

import jsonschema
import pytest
from testing.tool_templates import LLAMA3_1, MISTRAL, MISTRAL_ARGS, PLAIN, QWEN3

from mdi.core.constraint import Constraint
from mdi.core.errors import InputError
from mdi.core.tools import Tool, ToolChoice
from mdi.engine.grammar import Grammars
from mdi.engine.grammar_start import Rule
from mdi.prompt.tokenizer import Tokenizer
from mdi.tools.grammar import calls_constraint
from mdi.tools.parser import Arguments, Call, CallParser, Text
from mdi.tools.syntax import SYNTAXES
from tests.tools.conftest import MakeTokenizer

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 6},
        "unit": {"enum": ["C", "F<tool_call>"]},
        "days": {"type": "array", "items": {"type": "integer", "minimum": 1, "maximum": 9}, "maxItems": 3},
    },
    "required": ["city"],
}
TOOLS = (
    Tool("weather", None, WEATHER),
    Tool("clock"),
    Tool("weather_now", None, {"type": "object", "maxProperties": 1}),
)
SCHEMAS = {tool.name: tool.schema for tool in TOOLS}
FAMILIES = {
    "hermes": QWEN3,
    "llama3_json": LLAMA3_1,
    "mistral": MISTRAL,
    "mistral_args": MISTRAL_ARGS,
    "generic": PLAIN,
}
REQUIRED = [
    ToolChoice("required"),
    ToolChoice("required", parallel=False),
    ToolChoice("required", named="clock", parallel=False),
    ToolChoice("required", allowed=("clock", "weather")),
]


class Model:
    """Draws any token that a rule allows, each with the same chance."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.end = {tokenizer.backend.get_vocab()["</s>"]}
        self._n_tokens = tokenizer.backend.get_vocab_size()
        self.grammars = Grammars(tokenizer, frozenset(self.end), self._n_tokens)
        self.random = random.Random()

    def rule(self, family: str, tools: Sequence[Tool], choice: ToolChoice, content: Constraint | None = None) -> Rule:
        """What an answer with these tools follows."""
        constraint = calls_constraint(SYNTAXES[family], tools, choice, self.tokenizer.special_marks, content)
        return self.grammars.rule(constraint)

    def says(self, rule: Rule, first: str = "", limit: int = 600) -> tuple[str, bool]:
        """An answer that begins with this text, and whether it ended by itself."""
        ids = self.tokenizer.encode(first)
        for token_id in ids:
            rule.push(token_id)
        while len(ids) < limit and not rule.complete:
            mask = rule.mask(self.end, may_end=True)
            allowed = [token for token in range(self._n_tokens) if mask is None or mask[token // 8] >> token % 8 & 1]
            ids.append(self.random.choice(allowed))
            if ids[-1] in self.end:
                return self._text(ids[:-1]), True
            rule.push(ids[-1])
        return self._text(ids), rule.complete

    def _text(self, ids: Sequence[int]) -> str:
        marks = self.tokenizer.special_marks.values()
        shown = (self.tokenizer.token_bytes(token, skip_special_tokens=token not in marks) for token in ids)
        return b"".join(shown).decode(errors="replace")


@pytest.fixture(scope="module")
def models(tokenizer_with: MakeTokenizer) -> Iterator[dict[str, Model]]:
    """A model of each family."""
    made = {family: Model(tokenizer_with(template)[0]) for family, template in FAMILIES.items()}
    yield made
    for model in made.values():
        model.grammars.close()


@pytest.fixture
def model(models: dict[str, Model], family: str) -> Model:
    """A model of the family, which draws as it always does."""
    models[family].random.seed(1)
    return models[family]


def read(family: str, text: str) -> tuple[list[tuple[str, Any]], str]:
    """The calls of an answer, and its text."""
    parser = CallParser(SYNTAXES[family], SCHEMAS)
    events = parser.push(text) + parser.finish()
    assert parser.whole
    calls = [event.name for event in events if isinstance(event, Call)]
    arguments = [json.loads(event.text) for event in events if isinstance(event, Arguments)]
    return list(zip(calls, arguments, strict=True)), "".join(event.text for event in events if isinstance(event, Text))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("choice", REQUIRED, ids=str)
def test_required_calls_are_valid(model: Model, family: str, choice: ToolChoice) -> None:
    allowed = choice.among(TOOLS)
    rule = model.rule(family, allowed, choice)
    ended = 0
    for _ in range(8):
        text, whole = model.says(rule.copy())
        if not whole:
            continue
        ended += 1
        calls, rest = read(family, text)
        assert calls
        assert rest == ""
        assert len(calls) == 1 or (choice.parallel and SYNTAXES[family].parallel)
        for name, arguments in calls:
            assert name in {tool.name for tool in allowed}
            jsonschema.validate(arguments, SCHEMAS[name])
    assert ended >= 2


BEGUN = {
    "hermes": ["Well, <tool_call>", '<tool_call>\n{"name": "weather", '],
    "llama3_json": ['{"name": "weather", "parameters": ', ' \n{"name": "clock", "parameters": {', "so <|python_tag|>"],
    "mistral": ["[TOOL_CALLS]", "so [TOOL_CALLS] [", '[TOOL_CALLS][{"name": "weather_now", '],
    "mistral_args": ["[TOOL_CALLS]", "so [TOOL_CALLS]weather", "[TOOL_CALLS]weather_now[ARGS]"],
    "generic": ["<tool_call>"],
}


@pytest.mark.parametrize(("family", "first"), [(family, first) for family in BEGUN for first in BEGUN[family]])
@pytest.mark.parametrize("parallel", [True, False])
def test_a_call_that_begins_in_free_text_is_valid(model: Model, family: str, first: str, parallel: bool) -> None:
    rule = model.rule(family, TOOLS, ToolChoice("auto", parallel=parallel))
    assert rule.mask(model.end, may_end=True) is None
    for _ in range(4):
        text, whole = model.says(rule.copy(), first)
        while not whole:
            text, whole = model.says(rule.copy(), first)
        calls, _ = read(family, text)
        assert calls
        assert text.startswith(first)
        if not parallel or not SYNTAXES[family].parallel:
            assert len(calls) == 1 or SYNTAXES[family].end  # several stand in one list
        name, arguments = calls[0]
        jsonschema.validate(arguments, SCHEMAS[name])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("text", ["just text", "<tool_cal", "a < b", '{"name": "Ann"}', "[TOOL_", '{"name": "clock"}'])
def test_free_text_stays_free(model: Model, family: str, text: str) -> None:
    rule = model.rule(family, TOOLS, ToolChoice("auto")).copy()
    for token_id in model.tokenizer.encode(text):
        rule.push(token_id)
        assert rule.mask(model.end, may_end=True) is None
        assert not rule.complete


@pytest.mark.parametrize("family", ["mistral"])
def test_a_mark_that_is_a_special_token_begins_a_call(model: Model, family: str) -> None:
    tokenizer = model.tokenizer
    assert tokenizer.special_marks.keys() == {"[TOOL_CALLS]", "[ARGS]", "<|python_tag|>"}
    rule = model.rule(family, TOOLS[1:2], ToolChoice("auto")).copy()
    for token_id in (*tokenizer.encode("Well: "), tokenizer.special_marks["[TOOL_CALLS]"]):
        assert rule.mask(model.end, may_end=True) is None
        rule.push(token_id)
    text, _ = model.says(rule)
    assert text.lstrip().startswith('[{"name": "clock", "arguments": {')


CONTENT = Constraint(
    'start: %json {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}', "f"
)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_fits_its_schema_or_calls_a_tool(model: Model, family: str) -> None:
    """response_format beside tools."""
    for choice in (ToolChoice("auto"), ToolChoice("required")):
        rule = model.rule(family, TOOLS[1:2], choice, CONTENT)
        expected = {True, False} if choice.mode == "auto" else {True}
        kinds: set[bool] = set()
        for _ in range(80):
            text, whole = model.says(rule.copy(), limit=200)
            if whole:
                calls, rest = read(family, text)
                kinds.add(bool(calls))
                assert calls or "x" in json.loads(rest)
            if kinds == expected:
                break
        assert kinds == expected


@pytest.mark.parametrize("family", ["hermes"])
def test_the_error_of_a_schema_has_the_place_of_its_tool(model: Model, family: str) -> None:
    bad = Tool("bad", None, {"type": "object", "properties": {"a": {"type": "colour"}}}, field="tools[1].function")
    with pytest.raises(InputError) as refused:
        model.rule(family, (TOOLS[1], bad), ToolChoice("auto"))
    assert refused.value.field == "tools[1].function.parameters"
