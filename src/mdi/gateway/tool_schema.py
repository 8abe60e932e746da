"""The JSON schema of tools and of the choice among them, for the OpenAPI document: what `core.tools` reads."""

from __future__ import annotations

from typing import Any

from mdi.core.tools import MAX_TOOLS, NAME

Schema = dict[str, Any]

TOOL_NAME: Schema = {"type": "string", "pattern": f"^{NAME.pattern}$"}
FUNCTION: Schema = {
    "type": "object",
    "properties": {
        "name": TOOL_NAME,
        "description": {"type": ["string", "null"]},
        "parameters": {"type": ["object", "null"]},
        "strict": {"type": ["boolean", "null"]},
    },
    "required": ["name"],
}
NAMED: Schema = {
    "type": "object",
    "properties": {
        "type": {"const": "function"},
        "function": {"type": "object", "properties": {"name": TOOL_NAME}, "required": ["name"]},
    },
    "required": ["type", "function"],
}
ALLOWED: Schema = {
    "type": "object",
    "properties": {
        "type": {"const": "allowed_tools"},
        "allowed_tools": {
            "type": "object",
            "properties": {
                "mode": {"enum": ["auto", "required"]},
                "tools": {"type": "array", "items": NAMED, "minItems": 1},
            },
            "required": ["mode", "tools"],
        },
    },
    "required": ["type", "allowed_tools"],
}
TOOLS: Schema = {
    "type": "array",
    "maxItems": MAX_TOOLS,
    "items": {
        "type": "object",
        "properties": {"type": {"const": "function"}, "function": FUNCTION},
        "required": ["type", "function"],
    },
}
TOOL_CHOICE: Schema = {"anyOf": [{"enum": ["none", "auto", "required"]}, NAMED, ALLOWED]}
FUNCTIONS: Schema = {"type": "array", "maxItems": MAX_TOOLS, "items": FUNCTION}
FUNCTION_CALL: Schema = {
    "anyOf": [
        {"enum": ["none", "auto"]},
        {"type": "object", "properties": {"name": TOOL_NAME}, "required": ["name"]},
    ]
}
