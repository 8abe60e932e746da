"""The JSON schema of a response's input and tools, for the OpenAPI document: what `response_input` reads."""

from __future__ import annotations

from typing import Any

from mdi.core.tools import MAX_TOOLS
from mdi.gateway.message_schema import SOURCE, TEXT
from mdi.gateway.tool_schema import FUNCTION, TOOL_NAME

Schema = dict[str, Any]


def _typed(kind: str, required: tuple[str, ...], **properties: Schema) -> Schema:
    described: Schema = {"type": {"const": kind}, **properties}
    return {"type": "object", "properties": described, "required": ["type", *required]}


PARTS: Schema = {
    "type": "array",
    "items": {
        "anyOf": [
            _typed("input_text", ("text",), text=TEXT),
            _typed("output_text", ("text",), text=TEXT),
            _typed("refusal", ("refusal",), refusal=TEXT),
            _typed(
                "input_image",
                ("image_url",),
                image_url=SOURCE,
                detail={"enum": ["auto", "low", "high", "original", None]},
                file_id={"type": "null"},
            ),
        ]
    },
}
CONTENT: Schema = {"anyOf": [TEXT, PARTS | {"minItems": 1}]}
OUTPUT: Schema = {"anyOf": [TEXT, PARTS]}


def _message(roles: list[str], required: list[str], content: Schema) -> Schema:
    properties = {"type": {"enum": ["message", None]}, "role": {"enum": roles}, "content": content}
    return {"type": "object", "properties": properties, "required": required}


ITEM: Schema = {
    "anyOf": [
        _message(["user", "system", "developer"], ["role", "content"], CONTENT),
        _message(["assistant"], ["role"], {"anyOf": [*OUTPUT["anyOf"], {"type": "null"}]}),
        _typed("function_call", ("call_id", "name", "arguments"), call_id=TEXT, name=TEXT, arguments=TEXT),
        _typed("function_call_output", ("call_id", "output"), call_id=TEXT, output=OUTPUT),
        _typed("reasoning", ()),
    ]
}
INPUT: Schema = {"anyOf": [TEXT, {"type": "array", "items": ITEM, "minItems": 1}]}

TOOL: Schema = {**FUNCTION, "properties": {"type": {"const": "function"}, **FUNCTION["properties"]}}
TOOL["required"] = ["type", *FUNCTION["required"]]
TOOLS: Schema = {"type": "array", "items": TOOL, "maxItems": MAX_TOOLS}
NAMED = _typed("function", ("name",), name=TOOL_NAME)
ALLOWED = _typed(
    "allowed_tools",
    ("mode", "tools"),
    mode={"enum": ["auto", "required"]},
    tools={"type": "array", "items": NAMED, "minItems": 1},
)
TOOL_CHOICE: Schema = {"anyOf": [{"enum": ["auto", "none", "required"]}, NAMED, ALLOWED, {"type": "null"}]}
FORMAT: Schema = {
    "anyOf": [
        {"type": "object", "properties": {"type": {"enum": ["text", "json_object"]}}, "required": ["type"]},
        _typed(
            "json_schema",
            ("name", "schema"),
            name=TOOL_NAME,
            schema={"type": "object"},
            description={"type": ["string", "null"]},
            strict={"type": ["boolean", "null"]},
        ),
    ]
}
