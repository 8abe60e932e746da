"""What an answer must look like: the fields that ask for it, and answers of a random model that follow it."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import pytest

from mdi.core.constraint import Constraint
from tests.gateway.conftest import CHAT, FakeServer, RealServer

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}

TAGS: dict[str, Any] = {
    "type": "structural_tag",
    "structures": [{"begin": "<n>", "schema": {"type": "integer", "minimum": 0, "maximum": 9}, "end": "</n>"}],
    "triggers": ["<n"],
}


def constraint_of(server: FakeServer, **fields: Any) -> Constraint | None:
    answer = server.post("/v1/chat/completions", json={**CHAT, **fields})
    assert answer.status_code == 200, answer.text
    return server.engine.calls[-1].constraint


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"response_format": None},
        {"response_format": {"type": "text"}},
        {"structured_outputs": {}},
        {"structured_outputs": {"json_object": False, "regex": None}},
        {"guided_json": None, "guided_choice": None, "guided_whitespace_pattern": "a"},
    ],
)
def test_nothing_is_asked_for(server: FakeServer, fields: dict[str, Any]) -> None:
    assert constraint_of(server, **fields) is None


@pytest.mark.parametrize(
    ("fields", "field", "grammar"),
    [
        ({"response_format": {"type": "json_object"}}, "response_format", 'start: %json {"type": "object"'),
        ({"response_format": FORMAT}, "response_format.json_schema.schema", "start: %json " + json.dumps(PERSON)[:-1]),
        ({"structured_outputs": {"json": PERSON}}, "structured_outputs.json", "start: %json "),
        ({"structured_outputs": {"json": json.dumps(PERSON)}}, "structured_outputs.json", "start: %json "),
        ({"structured_outputs": {"json": True}}, "structured_outputs.json", 'start: %json {"x-'),
        ({"structured_outputs": {"regex": "a/b\n\\/"}}, "structured_outputs.regex", r"start: /a\/b\n\//"),
        (
            {"structured_outputs": {"choice": ['"é', "b"]}},
            "structured_outputs.choice",
            'start: CHOICE\nCHOICE: "\\"é" | "b"',
        ),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, "structured_outputs.grammar", 'start: "a"'),
        ({"structured_outputs": {"json_object": True}}, "structured_outputs.json_object", "start: %json "),
        ({"guided_json": PERSON}, "guided_json", "start: %json "),
        ({"guided_regex": "[ab]+"}, "guided_regex", "start: /[ab]+/"),
        ({"guided_choice": ["a", "b"]}, "guided_choice", 'start: CHOICE\nCHOICE: "a" | "b"'),
        ({"guided_grammar": 'start: "a"'}, "guided_grammar", 'start: "a"'),
    ],
)
def test_each_field_asks_for_a_grammar(server: FakeServer, fields: dict[str, Any], field: str, grammar: str) -> None:
    asked = constraint_of(server, **fields)
    assert asked
    assert asked.field == field
    assert asked.grammar.startswith(grammar)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": 1}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.name"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}},
            "response_format.json_schema.name",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": []}}},
            "response_format.json_schema.schema",
        ),
        ({"response_format": {"type": "structural_tag"}}, "response_format.structures"),
        ({"response_format": TAGS | {"triggers": []}}, "response_format.triggers"),
        ({"response_format": TAGS | {"triggers": None}}, "response_format.triggers"),
        ({"response_format": TAGS | {"triggers": ["x"]}}, "response_format.structures[0].begin"),
        ({"response_format": TAGS | {"structures": [{"begin": "<n>"}]}}, "response_format.structures[0].schema"),
        (
            {"response_format": {"type": "text", "json_schema": {"name": "a", "schema": [None]}}},
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": {"type": "text", "structures": [{"begin": "a", "schema": "b"}]}},
            "response_format.structures[0].schema",
        ),
        ({"structured_outputs": []}, "structured_outputs"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": 5}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": {"const": "\ud800"}}}, "structured_outputs.json"),
        ({"structured_outputs": {"regex": 5}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": ""}}, "structured_outputs.regex"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": ["a", 1]}}, "structured_outputs.choice[1]"),
        ({"structured_outputs": {"choice": "a"}}, "structured_outputs.choice"),
        ({"structured_outputs": {"json_object": "yes"}}, "structured_outputs.json_object"),
        ({"structured_outputs": {"grammar": {}}}, "structured_outputs.grammar"),
        ({"guided_json": {"a": [[[[]]] for _ in range(2)]}, "guided_regex": "a"}, "guided_regex"),
        ({"response_format": FORMAT, "structured_outputs": {"regex": "a"}}, "structured_outputs.regex"),
        ({"structured_outputs": {"json_object": True, "choice": ["a"]}}, "structured_outputs.choice"),
        ({"guided_regex": ["a"]}, "guided_regex"),
        ({"guided_choice": [None]}, "guided_choice[0]"),
    ],
)
@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_what_is_malformed_is_refused_by_its_name(
    server: FakeServer, path: str, fields: dict[str, Any], param: str
) -> None:
    valid = CHAT if path == "chat/completions" else {"model": "fake", "prompt": "x"}
    answer = server.post(
        f"/v1/{path}", content=json.dumps({**valid, **fields}), headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert param in answer.json()["error"]["message"]
    assert server.engine.calls == []


def test_unknown_fields_inside_are_ignored_and_listed(server: FakeServer) -> None:
    fields = {"response_format": {**FORMAT, "a": 1}, "structured_outputs": {"b": 2}}
    answer = server.post("/v1/chat/completions", json={**CHAT, **fields})
    assert answer.headers["x-mdi-ignored"] == "response_format.a, structured_outputs.b"


def asked(real: RealServer, path: str = "chat/completions", **fields: Any) -> Any:
    prompt: dict[str, Any] = {"prompt": "x"} if path == "completions" else {"messages": CHAT["messages"]}
    body = {"model": real.engine.model_name, "max_tokens": 200, "temperature": 1, **prompt, **fields}
    return real.post(f"/v1/{path}", json=body)


@pytest.mark.parametrize("seed", range(3))
def test_a_random_model_answers_in_json_of_the_schema(real: RealServer, seed: int) -> None:
    choice = asked(real, response_format=FORMAT, seed=seed).json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    jsonschema.validate(json.loads(choice["message"]["content"]), PERSON)


@pytest.mark.parametrize("asked_to_be_open", [False, True])
def test_numbers_and_objects_of_a_schema_are_read_as_meant(server: FakeServer, asked_to_be_open: bool) -> None:
    """2.0 is a whole number; objects have the properties that are listed, unless the request wants others."""
    inner = {"properties": {"a": {"const": {"properties": {}}}, "b": {"properties": {}, "additionalProperties": True}}}
    fields: dict[str, Any] = {"json": {"items": inner, "maxItems": 2.0}}
    if asked_to_be_open:
        fields["disable_additional_properties"] = False
    asked = constraint_of(server, structured_outputs=fields)
    assert asked
    schema = json.loads(asked.grammar.removeprefix("start: %json "))
    assert schema["items"] == (inner if asked_to_be_open else {"additionalProperties": False, **inner})
    assert '"maxItems": 2,' in asked.grammar


def test_a_structure_is_followed_from_its_trigger_on(real: RealServer) -> None:
    """The bias makes a random model write `<n>`, which it never would; the schema decides what follows."""
    biases = {str(ord(letter)): 100 for letter in "<n>"}
    answer = asked(real, response_format=TAGS, logit_bias=biases, max_tokens=400).json()
    text = answer["choices"][0]["message"]["content"]
    assert re.search(r"<n>[0-9]</n>", text)
    assert all(re.match(r"<n>[0-9]</n>|<n>[0-9]?(</?n?)?$", text[place:]) for place in _places(text, "<n>"))


def _places(text: str, part: str) -> list[int]:
    return [found.start() for found in re.finditer(part, text)]


def test_a_completion_follows_gbnf(real: RealServer) -> None:
    grammar = 'root ::= "a" [0-9] other\nother ::= ("b" | "c")'
    text = asked(real, "completions", structured_outputs={"grammar": grammar}).json()["choices"][0]["text"]
    assert re.fullmatch("a[0-9][bc]", text)


def test_a_completion_follows_its_regular_expression(real: RealServer) -> None:
    answer = asked(real, "completions", guided_regex=r"[a-f]{3}/\d{2}", n=3, seed=1).json()
    texts = [choice["text"] for choice in answer["choices"]]
    assert len(set(texts)) == 3
    assert all(re.fullmatch(r"[a-f]{3}/\d{2}", text) for text in texts)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"guided_json": {"not": {}}}, "guided_json", 'the keywords "not" are not supported'),
        ({"guided_json": {"properties": {}, "required": [[]]}}, "guided_json", "Expected string for 'required'"),
        ({"guided_regex": "("}, "guided_regex", "unclosed group"),
        ({"guided_grammar": "root ::= 5"}, "guided_grammar", "Rule '5' not found: write it in Lark"),
        (
            {"response_format": TAGS | {"structures": [{"begin": "<n>", "schema": {"not": {}}}]}},
            "response_format.structures[0].schema",
            'the keywords "not" are not supported',
        ),
    ],
)
def test_what_cannot_be_followed_is_refused_with_its_cause(
    real: RealServer, fields: dict[str, Any], param: str, message: str, stream: bool
) -> None:
    answer = asked(real, **fields, stream=stream)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert message in answer.json()["error"]["message"]
