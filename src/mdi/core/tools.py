"""Tools that a model may call, and which of them it has to: as requests give them in OpenAI's form."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mdi.core.errors import InputError
from mdi.core.unknown_fields import UnknownField, report_unknown, warn_once
from mdi.core.values import checked_json, checked_text

ChoiceMode = Literal["auto", "required", "none"]

MAX_TOOLS = 128
NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
MAX_SCHEMA_DEPTH = 64  # an object inside of an object takes two
MAX_SCHEMA_CHARACTERS = 256 * 1024
NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the caller runs when the model asks for it.

    parameters: the JSON schema of its arguments; None for a function without any. strict: nothing but what the schema
    names may be among them. field: the request's name for it.
    """

    name: str
    description: str | None = None
    parameters: Mapping[str, Any] | None = None
    strict: bool = False
    field: str = "tools"

    @property
    def schema(self) -> Mapping[str, Any]:
        """The JSON schema that its arguments fit."""
        return NO_ARGUMENTS if self.parameters is None else self.parameters

    @property
    def described(self) -> dict[str, Any]:
        """The tool as chat templates read it: OpenAI's form."""
        given = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": {name: value for name, value in given.items() if value is not None}}


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Which tools an answer calls.

    mode: auto leaves it to the model, required wants at least one call, none forbids them. named: the one tool that
    must be called, once. allowed: the only tools that may be called; empty for all. parallel: whether an answer may
    have several calls.
    """

    mode: ChoiceMode = "auto"
    named: str | None = None
    allowed: tuple[str, ...] = ()
    parallel: bool = True

    def among(self, tools: Sequence[Tool]) -> tuple[Tool, ...]:
        """The tools that may be called."""
        if self.named is not None:
            return tuple(tool for tool in tools if tool.name == self.named)
        return tuple(tool for tool in tools if not self.allowed or tool.name in self.allowed)


def parse_tools(given: Any, unknown: UnknownField = warn_once, field: str = "tools") -> tuple[Tool, ...]:
    """Reads `tools`: {"type": "function", "function": {name, description, parameters, strict}}.

    unknown: called with the path of each unknown field. Raises InputError, naming the field.
    """
    items = _list(given, field)
    functions = []
    for index, tool in enumerate(items):
        path = f"{field}[{index}]"
        if not isinstance(tool, Mapping):
            raise InputError(f"{path} must be an object with a type and a function", path)
        if tool.get("type") != "function":
            raise InputError(f"{path}.type must be function, got {_shown(tool.get('type'))}", f"{path}.type")
        report_unknown(tool, ("type", "function"), path, unknown)
        functions.append((tool.get("function"), f"{path}.function"))
    return _tools(functions, unknown)


def parse_functions(given: Any, unknown: UnknownField = warn_once) -> tuple[Tool, ...]:
    """Reads `functions`, the older form of `tools`: {name, description, parameters}. Raises InputError."""
    items = _list(given, "functions")
    return _tools([(function, f"functions[{index}]") for index, function in enumerate(items)], unknown)


def parse_choice(given: Any, tools: Sequence[Tool], *, parallel: bool = True) -> ToolChoice:
    """Reads `tool_choice`: "none", "auto", "required", {"type": "function", "function": {"name": name}}, or
    {"type": "allowed_tools", "allowed_tools": {"mode": "auto" | "required", "tools": [...]}}.

    None is auto where there are tools. Raises InputError, naming the field, for what is none of them.
    """
    field = "tool_choice"
    if given is None or given in ("none", "auto"):
        return ToolChoice(given if tools and given else "auto" if tools else "none", parallel=parallel)
    if given == "required":
        _require_tools(tools, field)
        return ToolChoice("required", parallel=parallel)
    kind = given.get("type") if isinstance(given, Mapping) else None
    if kind == "function":
        _require_tools(tools, field)
        return ToolChoice("required", named=_named(given, field, tools), parallel=False)
    if kind == "allowed_tools":
        _require_tools(tools, field)
        return _allowed(given.get(kind), f"{field}.{kind}", tools, parallel)
    raise InputError(
        'tool_choice must be "none", "auto", "required", {"type": "function", "function": {"name": ...}} or '
        '{"type": "allowed_tools", ...}',
        field,
    )


def parse_function_call(given: Any, tools: Sequence[Tool]) -> ToolChoice:
    """Reads `function_call`, the older form of `tool_choice`: "none", "auto" or {"name": name}. Raises InputError."""
    field = "function_call"
    if given is None or given in ("none", "auto"):
        return ToolChoice(given if tools and given else "auto" if tools else "none", parallel=False)
    if not isinstance(given, Mapping):
        raise InputError('function_call must be "none", "auto" or {"name": ...}', field)
    _require_tools(tools, field, "functions")
    return ToolChoice("required", named=_known(given.get("name"), f"{field}.name", tools), parallel=False)


def _allowed(given: Any, path: str, tools: Sequence[Tool], parallel: bool) -> ToolChoice:
    if not isinstance(given, Mapping) or given.get("mode") not in ("auto", "required"):
        raise InputError(f"{path}.mode must be auto or required", f"{path}.mode")
    listed = given.get("tools")
    if not isinstance(listed, (list, tuple)) or not listed:
        raise InputError(f"{path}.tools must be a list with at least one tool", f"{path}.tools")
    names = [_named(tool, f"{path}.tools[{index}]", tools) for index, tool in enumerate(listed)]
    return ToolChoice(given["mode"], allowed=tuple(names), parallel=parallel)


def _named(given: Any, path: str, tools: Sequence[Tool]) -> str:
    """The name in {"type": "function", "function": {"name": name}}; the name may stand outside, as in responses."""
    function = given.get("function", given) if isinstance(given, Mapping) else None
    if not isinstance(function, Mapping):
        raise InputError(f"{path}.function must be an object with the name of a tool", f"{path}.function")
    return _known(function.get("name"), f"{path}.function.name", tools)


def _known(name: Any, path: str, tools: Sequence[Tool]) -> str:
    names = [tool.name for tool in tools]
    if name not in names:
        raise InputError(f"{path} is {_shown(name)}, which is not among the tools: {_listed(names)}", path)
    return str(name)


def _require_tools(tools: Sequence[Tool], field: str, place: str = "tools") -> None:
    if not tools:
        raise InputError(f"{field} asks for a call, but there are no {place}: send some, or leave it out", field)


def _list(given: Any, field: str) -> Sequence[Any]:
    if not isinstance(given, (list, tuple)):
        raise InputError(f"{field} must be a list", field)
    if len(given) > MAX_TOOLS:
        raise InputError(f"{field} may have {MAX_TOOLS} entries, and this request has {len(given)}", field)
    return given


def _tools(functions: Sequence[tuple[Any, str]], unknown: UnknownField) -> tuple[Tool, ...]:
    tools: dict[str, Tool] = {}
    for function, path in functions:
        tool = _tool(function, path, unknown)
        if tool.name in tools:
            raise InputError(
                f"{path}.name is {tool.name!r}, as {tools[tool.name].field}.name: rename one", f"{path}.name"
            )
        tools[tool.name] = tool
    return tuple(tools.values())


def _tool(given: Any, path: str, unknown: UnknownField) -> Tool:
    if not isinstance(given, Mapping):
        raise InputError(f"{path} must be an object with a name", path)
    report_unknown(given, ("name", "description", "parameters", "strict"), path, unknown)
    name, description, parameters, strict = map(given.get, ("name", "description", "parameters", "strict"))
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise InputError(
            f"{path}.name must have 1 to 64 letters, digits, _ or -, got {_shown(name)}",
            f"{path}.name",
        )
    if description is not None and not isinstance(description, str):
        raise InputError(f"{path}.description must be a string", f"{path}.description")
    if strict is not None and not isinstance(strict, bool):
        raise InputError(f"{path}.strict must be true or false", f"{path}.strict")
    return Tool(
        name,
        checked_text(description, f"{path}.description") if description is not None else None,
        _schema(parameters, f"{path}.parameters"),
        bool(strict),
        path,
    )


def _schema(given: Any, path: str) -> Mapping[str, Any] | None:
    """A JSON schema of an object. Raises InputError for anything else, and for a large one."""
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise InputError(f"{path} must be a JSON schema, which is an object", path)
    if given.get("type", "object") != "object":
        raise InputError(f"{path}.type must be object", f"{path}.type")
    schema: Mapping[str, Any] = checked_json(given, path, MAX_SCHEMA_DEPTH)
    if (length := len(json.dumps(schema))) > MAX_SCHEMA_CHARACTERS:
        raise InputError(f"{path} has {length} characters: a schema has at most {MAX_SCHEMA_CHARACTERS}", path)
    return schema


def _shown(value: Any) -> str:
    return repr(value)[:80]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
