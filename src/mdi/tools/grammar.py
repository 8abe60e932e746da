"""Grammars that hold calls of tools to their names and schemas, in llguidance's Lark dialect."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mdi.core.tools import Tool
from mdi.tools.syntax import Syntax

SCHEMAS = ("items", "prefixItems", "additionalProperties")
NAMED_SCHEMAS = ("properties", "$defs", "definitions")
CHOICES = ("anyOf", "oneOf")
OPEN = (*CHOICES, "patternProperties", "propertyNames", "if", "$ref", "additionalProperties", "unevaluatedProperties")
"""Keywords of JSON schema beside which an object is not closed: they may name further properties."""


def calls_grammar(
    syntax: Syntax, tools: Iterable[Tool], special: Mapping[str, int], *, parallel: bool, content: str | None = None
) -> str:
    """The grammar of an answer that is calls of these tools, from the first one's begin on.

    special: marks that are special tokens, and their ids. parallel: several calls may follow each other. content: the
    JSON schema, as Lark, of an answer that may stand in place of calls.
    """
    tools = tuple(tools)
    begins = " | ".join(_literal(begin, special) for begin in syntax.begins)
    more = f" ({_literal(syntax.separator, special)} call)*" if parallel and syntax.parallel else ""
    rules = [
        "start: calls" + (" | content" if content is not None else ""),
        f"calls: begin call{more} {_literal(syntax.end, special)}".rstrip(),
        f"begin: {begins}",
        "call: " + " | ".join(f"call_{number}" for number in range(len(tools))),
    ]
    for number, tool in enumerate(tools):
        head, after = _literal(syntax.head(tool.name), special), _literal(syntax.after, special)
        rules.append(f"call_{number}: {head} arguments_{number} {after}")
        rules.append(f"arguments_{number}: {arguments_rule(tool)}")
    if content is not None:
        rules.append(f"content: {content}")
    return "\n".join(rules) + "\n"


def arguments_rule(tool: Tool) -> str:
    """The right side of the rule for a tool's arguments."""
    return "%json " + json.dumps(closed(tool.schema))


def closed(schema: Any) -> Any:
    """The schema, with objects that list their properties closed to others where it leaves that open.

    Arguments that a function does not have are of no use to it. What fits the closed schema fits the schema. One with
    allOf stays as it is: its parts add up.
    """
    return schema if '"allOf":' in json.dumps(schema) else _closed(schema)


def _closed(schema: Any) -> Any:
    if isinstance(schema, list):
        return list(map(_closed, schema))
    if not isinstance(schema, Mapping):
        return schema
    made = dict(schema)
    for name, value in schema.items():
        if name in NAMED_SCHEMAS and isinstance(value, Mapping):
            made[name] = {key: _closed(item) for key, item in value.items()}
        elif name in SCHEMAS or (name in CHOICES and "properties" not in schema):
            made[name] = _closed(value)
    if "properties" in schema and not any(keyword in schema for keyword in OPEN):
        made["additionalProperties"] = False
    return made


def begins_of(syntax: Syntax, names: Sequence[str]) -> tuple[str, ...]:
    """Texts at an answer's start that begin a call without a mark."""
    return tuple(map(syntax.head, names)) if "" in syntax.begins else ()


def _literal(text: str, special: Mapping[str, int]) -> str:
    """A text as Lark writes it; marks that are special tokens by their ids."""
    pattern = "|".join(map(re.escape, special))
    pieces = re.split(f"({pattern})", text) if special else [text]
    written = (f"<[{special[piece]}]>" if piece in special else json.dumps(piece) for piece in pieces if piece)
    return " ".join(written) or '""'
