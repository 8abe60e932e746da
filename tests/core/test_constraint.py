"""Schemas as grammars take them."""

from __future__ import annotations

from typing import Any

import pytest

from mdi.core.constraint import closed


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"properties": {"a": {}}}, {"properties": {"a": {}}, "additionalProperties": False}),
        ({"properties": {}, "additionalProperties": True}, {"properties": {}, "additionalProperties": True}),
        ({"properties": {}, "anyOf": [{"properties": {}}]}, {"properties": {}, "anyOf": [{"properties": {}}]}),
        (
            {"items": {"properties": {"properties": {"type": "string"}}}},
            {"items": {"properties": {"properties": {"type": "string"}}, "additionalProperties": False}},
        ),
        ({"allOf": [{"properties": {}}]}, {"allOf": [{"properties": {}}]}),
        ({"const": {"properties": {}}}, {"const": {"properties": {}}}),
        ({"$ref": "#/$defs/a", "properties": {}}, {"$ref": "#/$defs/a", "properties": {}}),
        ({"properties": {"a": {}}, "required": ["b"]}, {"properties": {"a": {}}, "required": ["b"]}),
        ({"properties": {"a": {}}, "minProperties": 2}, {"properties": {"a": {}}, "minProperties": 2}),
        (
            {"anyOf": [{"properties": {"a": {}}}, {"$ref": "#/$defs/b"}], "$defs": {"b": {"properties": {}}}},
            {
                "anyOf": [{"properties": {"a": {}}, "additionalProperties": False}, {"$ref": "#/$defs/b"}],
                "$defs": {"b": {"properties": {}, "additionalProperties": False}},
            },
        ),
        ({"properties": {}, "required": [[]]}, {"properties": {}, "required": [[]]}),
        (
            {"properties": 5, "required": 5, "minProperties": "x"},
            {"properties": 5, "required": 5, "minProperties": "x"},
        ),
        (True, True),
    ],
)
def test_objects_are_closed_where_their_schema_leaves_it_open(schema: Any, expected: Any) -> None:
    assert closed(schema) == expected
