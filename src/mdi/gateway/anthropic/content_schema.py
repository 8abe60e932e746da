"""The JSON schema of Anthropic's messages and tools, for the OpenAPI document: what `message_input` reads."""

from __future__ import annotations

from typing import Any

from mdi.core.tools import MAX_TOOLS
from mdi.gateway.message_schema import SOURCE, TEXT
from mdi.gateway.tool_schema import TOOL_NAME

Schema = dict[str, Any]


def _typed(kind: str, required: tuple[str, ...], **properties: Schema) -> Schema:
    described: Schema = {"type": {"const": kind}, **properties}
    return {"type": "object", "properties": described, "required": ["type", *required]}


def _content(*blocks: Schema, least: int = 1) -> Schema:
    return {"anyOf": [TEXT, {"type": "array", "items": {"anyOf": list(blocks)}, "minItems": least}]}


TEXT_BLOCK = _typed("text", ("text",), text=TEXT)
IMAGE_SOURCE: Schema = {
    "anyOf": [
        _typed("url", ("url",), url=SOURCE),
        _typed("base64", ("media_type", "data"), media_type=TEXT, data=TEXT),
    ]
}
IMAGE = _typed("image", ("source",), source=IMAGE_SOURCE)
RESULT_CONTENT: Schema = {"anyOf": [_content(TEXT_BLOCK, IMAGE, least=0), {"type": "null"}]}
RESULT = _typed("tool_result", ("tool_use_id",), tool_use_id=TEXT, content=RESULT_CONTENT)
CALL = _typed("tool_use", ("id", "name", "input"), id=TEXT, name=TEXT, input={"type": "object"})
THOUGHT = _typed("thinking", ("thinking",), thinking=TEXT)
SYSTEM = _content(TEXT_BLOCK)


def _message(role: str, content: Schema) -> Schema:
    properties = {"role": {"const": role}, "content": content}
    return {"type": "object", "properties": properties, "required": ["role", "content"]}


MESSAGES: Schema = {
    "type": "array",
    "minItems": 1,
    "items": {
        "anyOf": [
            _message("user", _content(TEXT_BLOCK, IMAGE, RESULT)),
            _message("assistant", _content(TEXT_BLOCK, CALL, THOUGHT, _typed("redacted_thinking", ()))),
            _message("system", SYSTEM),
        ]
    },
}
TOOLS: Schema = {
    "type": "array",
    "maxItems": MAX_TOOLS,
    "items": {
        "type": "object",
        "properties": {
            "type": {"enum": ["custom", None]},
            "name": TOOL_NAME,
            "description": {"type": ["string", "null"]},
            "input_schema": {"type": ["object", "null"]},
            "strict": {"type": ["boolean", "null"]},
        },
        "required": ["name"],
    },
}
FORMAT = _typed("json_schema", ("schema",), schema={"type": "object"})
