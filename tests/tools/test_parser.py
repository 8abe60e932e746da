"""Text of answers to text and calls of tools, in the syntax of each family."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdi.tools.parser import Arguments, Call, CallParser, Event, Text
from mdi.tools.syntax import SYNTAXES

NAMES = ("get", "get_weather", "put-2")
CALLS = [("get", '{"a": "}\\" <tool_call> [TOOL_CALLS] [", "b": [{}, "]"]}'), ("put-2", "{}")]


def read(syntax: str, pieces: Sequence[str]) -> tuple[list[Event], bool]:
    """The events of a text, those of the same kind that follow each other as one, and whether all calls are whole."""
    parser = CallParser(SYNTAXES[syntax], NAMES)
    events: list[Event] = []
    for event in [*(event for piece in pieces for event in parser.push(piece)), *parser.finish()]:
        match events, event:
            case [*_, Text(before)], Text(text):
                events[-1] = Text(before + text)
            case [*_, Arguments(before)], Arguments(text):
                events[-1] = Arguments(before + text)
            case _:
                events.append(event)
    return events, parser.whole


def calls(*made: tuple[str, str]) -> list[Event]:
    return [event for name, arguments in made for event in (Call(name), Arguments(arguments))]


ANSWERS: list[tuple[str, str, list[Event], bool]] = [
    ("hermes", SYNTAXES["hermes"].written(CALLS), calls(*CALLS), True),
    ("mistral", SYNTAXES["mistral"].written(CALLS), calls(*CALLS), True),
    ("mistral_args", SYNTAXES["mistral_args"].written(CALLS), calls(*CALLS), True),
    ("mistral_args", "Well. [TOOL_CALLS]get[ARGS]{}", [Text("Well."), *calls(("get", "{}"))], True),
    ("mistral_args", "[TOOL_CALLS]get_weather[ARG", [], True),
    ("llama3_json", SYNTAXES["llama3_json"].written(CALLS[:1]), calls(CALLS[0]), True),
    ("llama3_json", '<|python_tag|>{"name": "get", "parameters": {}}', calls(("get", "{}")), True),
    ("mistral", '[TOOL_CALLS][{"name": "get", "arguments": {}}] ok', [*calls(("get", "{}")), Text(" ok")], True),
    (
        "hermes",
        'I look.\n\n<tool_call>\n{"name": "get", "arguments": {}}\n</tool_call>\n',
        [Text("I look."), *calls(("get", "{}"))],
        True,
    ),
    ("hermes", '<tool_call>\n{"name": "unknown", "arguments": {}}\n</tool_call>', [], True),
    ("hermes", "say <tool_call> and <tool", [Text("say <tool_call> and <tool")], True),
    ("hermes", " \n only text \n", [Text(" \n only text \n")], True),
    ("hermes", '<tool_call>\n{"name": "get_we', [], True),
    ("hermes", '<tool_call>\n{"name": "get_weather", "arguments": {"a": "b', calls(("get_weather", '{"a": "b')), False),
    ("hermes", '<tool_call>\n{"name": "get", "arguments": {}}\n</tool', calls(("get", "{}")), True),
    ("mistral", '[TOOL_CALLS] [{"name": "get", "arguments": {}}, {"na', calls(("get", "{}")), True),
    ("llama3_json", '{"name": "Ann", "age": 7}', [Text('{"name": "Ann", "age": 7}')], True),
    ("llama3_json", 'Send {"name": "get", "parameters": {}}', [Text('Send {"name": "get", "parameters": {}}')], True),
    ("llama3_json", '{"name": "ge', [Text('{"name": "ge')], True),
]


@pytest.mark.parametrize(("syntax", "text", "events", "whole"), ANSWERS)
@settings(deadline=None, max_examples=30)
@given(cuts=st.lists(st.integers(0, 120), max_size=12))
def test_any_split_of_an_answer_gives_its_calls(
    syntax: str, text: str, events: list[Event], whole: bool, cuts: list[int]
) -> None:
    places = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    pieces = [text[start:end] for start, end in itertools.pairwise(places)]
    if "unknown" in text:
        events = [Text(text)]
    assert read(syntax, pieces) == (events, whole)


TEXTS = st.lists(
    st.sampled_from(
        [
            "<tool_call>",
            "\n",
            '{"name": "',
            "get",
            '", "arguments": ',
            "{",
            "}",
            '"',
            "\\",
            "</tool_call>",
            " ",
            "a",
            "[TOOL_CALLS] [",
            "[TOOL_CALLS]",
            "[ARGS]",
            "]",
            ", ",
            '", "parameters": ',
            "<|python_tag|>",
            "<",
            "[",
            "ö",
        ]
    ),
    max_size=20,
)


@settings(deadline=None, max_examples=30)
@given(syntax=st.sampled_from(sorted(SYNTAXES)), parts=TEXTS, cuts=st.lists(st.integers(0, 100), max_size=6))
def test_any_split_of_any_text_gives_the_same(syntax: str, parts: list[str], cuts: list[int]) -> None:
    text = "".join(parts)
    places = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    pieces = [text[start:end] for start, end in itertools.pairwise(places)]
    assert read(syntax, pieces) == read(syntax, [text]) == read(syntax, list(text))


ARGUMENTS = st.dictionaries(st.text(), st.recursive(st.text() | st.integers(), st.lists, max_leaves=4), max_size=3)


@settings(deadline=None, max_examples=30)
@given(syntax=st.sampled_from(sorted(SYNTAXES)), arguments=st.lists(ARGUMENTS, min_size=1, max_size=3))
def test_any_arguments_are_found_as_they_are(syntax: str, arguments: list[dict[str, object]]) -> None:
    made = [("get_weather", json.dumps(each, ensure_ascii=False)) for each in arguments]
    made = made if SYNTAXES[syntax].parallel else made[:1]
    assert read(syntax, list(SYNTAXES[syntax].written(made))) == (calls(*made), True)
