"""Tools and the choice among them, in OpenAI's form."""

from __future__ import annotations

from typing import Any

import pytest

from mdi.core.errors import InputError
from mdi.core.tools import Tool, ToolChoice, parse_choice, parse_function_call, parse_functions, parse_tools


def tool(name: Any = "get", **function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **function}}


GET, PUT = Tool("get", field="tools[0].function"), Tool("put", field="tools[1].function")


def test_tools_are_read_with_their_schemas() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    given = [tool(description="Gets it.", parameters=schema, strict=True), tool("put")]
    assert parse_tools(given) == (Tool("get", "Gets it.", schema, True, "tools[0].function"), PUT)
    assert parse_tools(given)[0].described == tool(description="Gets it.", parameters=schema)
    assert parse_functions([{"name": "put"}]) == (Tool("put", field="functions[0]"),)


def test_unknown_fields_are_reported() -> None:
    unknown: list[str] = []
    parse_tools([{**tool(extra=1), "cache_control": {}}], unknown.append)
    assert unknown == ["tools[0].cache_control", "tools[0].function.extra"]


BAD_TOOLS: list[tuple[Any, str]] = [
    ("get", "tools"),
    ({}, "tools"),
    ([7], "tools[0]"),
    ([{"function": {"name": "get"}}], "tools[0].type"),
    ([{"type": "custom", "custom": {"name": "get"}}], "tools[0].type"),
    ([{"type": "function"}], "tools[0].function"),
    ([tool(None)], "tools[0].function.name"),
    ([tool("")], "tools[0].function.name"),
    ([tool("a b")], "tools[0].function.name"),
    ([tool("x" * 65)], "tools[0].function.name"),
    ([tool("é")], "tools[0].function.name"),
    ([tool("get\n")], "tools[0].function.name"),
    ([tool(), tool("put"), tool()], "tools[2].function.name"),
    ([tool(description=7)], "tools[0].function.description"),
    ([tool(description="\ud800")], "tools[0].function.description"),
    ([tool(parameters=[])], "tools[0].function.parameters"),
    ([tool(parameters={"type": "string"})], "tools[0].function.parameters.type"),
    ([tool(parameters={"x": "\ud800"})], "tools[0].function.parameters"),
    ([tool(parameters={"enum": ["x" * 300_000]})], "tools[0].function.parameters"),
    ([tool(strict="yes")], "tools[0].function.strict"),
    ([tool(f"f{number}") for number in range(129)], "tools"),
]


@pytest.mark.parametrize(("given", "field"), BAD_TOOLS, ids=lambda value: str(value)[:60])
def test_malformed_tools_are_refused_by_name(given: Any, field: str) -> None:
    with pytest.raises(InputError) as refused:
        parse_tools(given)
    assert refused.value.field == field


def named(name: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def allowed(mode: Any, *tools: Any) -> dict[str, Any]:
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": list(tools)}}


def test_choices_are_read() -> None:
    tools = (GET, PUT)
    assert parse_choice(None, tools) == parse_choice("auto", tools) == ToolChoice("auto")
    assert parse_choice("none", tools) == ToolChoice("none")
    assert parse_choice(None, ()) == parse_choice("auto", ()) == ToolChoice("none")
    assert parse_choice("required", tools, parallel=False) == ToolChoice("required", parallel=False)
    assert parse_choice(named("put"), tools) == ToolChoice("required", named="put", parallel=False)
    assert parse_choice(named("put"), tools).among(tools) == (PUT,)
    some = parse_choice(allowed("auto", named("put")), tools)
    assert some == ToolChoice("auto", allowed=("put",))
    assert some.among(tools) == (PUT,)
    assert parse_function_call({"name": "get"}, tools) == ToolChoice("required", named="get", parallel=False)
    assert parse_function_call("none", tools) == ToolChoice("none", parallel=False)


BAD_CHOICES: list[tuple[Any, Any, str]] = [
    ("sometimes", (GET,), "tool_choice"),
    (7, (GET,), "tool_choice"),
    ([], (GET,), "tool_choice"),
    ({"type": "custom"}, (GET,), "tool_choice"),
    ("required", (), "tool_choice"),
    (named("get"), (), "tool_choice"),
    (named("put"), (GET,), "tool_choice.function.name"),
    (named(None), (GET,), "tool_choice.function.name"),
    (named({}), (GET,), "tool_choice.function.name"),
    ({"type": "function", "function": "get"}, (GET,), "tool_choice.function"),
    ({"type": "allowed_tools"}, (GET,), "tool_choice.allowed_tools.mode"),
    (allowed("none", named("get")), (GET,), "tool_choice.allowed_tools.mode"),
    (allowed("auto"), (GET,), "tool_choice.allowed_tools.tools"),
    (allowed("auto", named("put")), (GET,), "tool_choice.allowed_tools.tools[0].function.name"),
    (allowed("auto", 7), (GET,), "tool_choice.allowed_tools.tools[0].function"),
]


@pytest.mark.parametrize(("given", "tools", "field"), BAD_CHOICES, ids=lambda value: str(value)[:60])
def test_malformed_choices_are_refused_by_name(given: Any, tools: Any, field: str) -> None:
    with pytest.raises(InputError) as refused:
        parse_choice(given, tools)
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("given", "tools", "field"),
    [
        (7, (GET,), "function_call"),
        ("required", (GET,), "function_call"),
        ({"name": "get"}, (), "function_call"),
        ({"name": "put"}, (GET,), "function_call.name"),
        ({}, (GET,), "function_call.name"),
    ],
)
def test_malformed_calls_of_the_older_form_are_refused_by_name(given: Any, tools: Any, field: str) -> None:
    with pytest.raises(InputError) as refused:
        parse_function_call(given, tools)
    assert refused.value.field == field
