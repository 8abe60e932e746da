"""What an answer must look like: a grammar for its text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BLANKS = " "
"""What may stand between the parts of JSON, or nothing: without a limit, a weak model writes blanks to its end."""

SCHEMAS = ("items", "prefixItems", "additionalProperties")
NAMED_SCHEMAS = ("properties", "$defs", "definitions")
CHOICES = ("anyOf", "oneOf")
OPEN = (*CHOICES, "patternProperties", "propertyNames", "if", "$ref", "additionalProperties", "unevaluatedProperties")
"""Keywords of JSON schema beside which an object is not closed: they may name further properties."""


@dataclass(frozen=True, slots=True)
class Constraint:
    """A grammar that the text of every answer to a request follows.

    grammar: in llguidance's dialect of Lark (its docs/syntax.md): `%json {...}` embeds a JSON schema, `/.../` a regular
    expression, and `<|name|>` a special token. field: the request's name for it, for errors.

    begins: the grammar holds from the first of these texts on, which is its own beginning; before, an answer is free.
    opens: the same for texts that count at an answer's start only. Without either it holds from the start. repeats:
    where the grammar is complete, the answer is free again; otherwise it ends.
    parts: grammars within this one, by the request's names for them: an error names the first that has one.
    """

    grammar: str
    field: str
    begins: tuple[str, ...] = ()
    opens: tuple[str, ...] = ()
    repeats: bool = False
    parts: tuple[tuple[str, str], ...] = ()


def json_rule(schema: Mapping[str, Any] | bool, blanks: str = BLANKS) -> str:
    """The part of a grammar that is JSON of a schema. blanks: a regular expression for what may stand between parts."""
    given = dict(schema) if isinstance(schema, Mapping) else {} if schema else {"not": {}}
    return "%json " + json.dumps({**given, "x-guidance": {"whitespace_pattern": blanks}})


def closed(schema: Any) -> Any:
    """The schema, with objects that list their properties closed to others where it leaves that open.

    What fits the closed schema fits the schema, and a weak model cannot go on with properties that nobody asked for. A
    schema whose parts add up (allOf, or $ref beside properties) stays as it is.
    """
    return schema if _adds_up(schema) else _closed(schema)


def _adds_up(schema: Any) -> bool:
    if isinstance(schema, list):
        return any(map(_adds_up, schema))
    if not isinstance(schema, Mapping):
        return False
    return "allOf" in schema or {"$ref", "properties"} <= schema.keys() or any(map(_adds_up, schema.values()))


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
    if _lists_all(schema):
        made["additionalProperties"] = False
    return made


def _lists_all(schema: Mapping[str, Any]) -> bool:
    """Whether the schema of an object names all properties that it needs, and says nothing of others."""
    listed, required, least = (schema.get(name) for name in ("properties", "required", "minProperties"))
    if not isinstance(listed, Mapping) or any(keyword in schema for keyword in OPEN):
        return False
    names = list(listed)  # strangers may require what is no name, and cannot be looked up in a dictionary
    missing = isinstance(required, list) and any(name not in names for name in required)
    return not missing and not (isinstance(least, int) and least > len(listed))
