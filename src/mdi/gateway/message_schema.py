"""The JSON schema of messages in the chat form, for the OpenAPI document: what `core.messages` reads."""

from __future__ import annotations

from typing import Any

from mdi.core.messages import MAX_SETTING, PIXELS, SETTINGS
from mdi.core.template_settings import MAX_SETTINGS, NAME, RESERVED, WORD

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
SOURCE: Schema = {"type": "string", "minLength": 1}
WHOLE: Schema = {"type": ["integer", "null"], "minimum": 1, "maximum": MAX_SETTING}
SETTING: dict[str, Schema] = {
    "fps": {"type": ["number", "null"], "exclusiveMinimum": 0, "maximum": MAX_SETTING},
    "nframes": WHOLE | {"minimum": 2},
    **dict.fromkeys((*PIXELS, "total_pixels"), WHOLE),
}
DETAIL: Schema = {"enum": ["auto", "low", "high", None]}

TEMPLATE_SETTINGS: Schema = {
    "type": "object",
    "maxProperties": MAX_SETTINGS,
    "propertyNames": {"pattern": f"^{NAME.pattern}$", "not": {"enum": sorted(RESERVED)}},
    "additionalProperties": {
        "anyOf": [{"type": ["boolean", "number", "null"]}, {"type": "string", "pattern": f"^{WORD.pattern}$"}]
    },
}


def messages_schema(*, strict: bool) -> Schema:
    """strict: unknown fields are refused."""

    def object_of(required: tuple[str, ...], **properties: Schema) -> Schema:
        schema = {"type": "object", "properties": properties, "required": list(required)}
        return schema | ({"additionalProperties": False} if strict else {})

    def part(name: str, value: Schema, kind: str) -> Schema:
        settings = {setting: SETTING[setting] for setting in SETTINGS[kind]}
        return object_of(("type", name), type={"const": name}, **{name: value}, **settings)

    def url(kind: str) -> Schema:
        settings = {setting: SETTING[setting] for setting in SETTINGS[kind]}
        return {"anyOf": [SOURCE, object_of(("url",), url=SOURCE, detail=DETAIL, **settings)]}

    frames: Schema = {"type": "array", "items": SOURCE, "minItems": 1}
    parts: Schema = {
        "type": "array",
        "items": {
            "anyOf": [
                part("text", TEXT, "text"),
                part("refusal", TEXT, "text"),
                part("image", SOURCE, "image"),
                part("image_url", url("image"), "image"),
                part("video", {"anyOf": [SOURCE, frames]}, "video"),
                part("video_url", url("video"), "video"),
            ]
        },
    }
    name_or_null: Schema = {"type": ["string", "null"]}
    arguments: Schema = {"type": ["string", "object", "array", "number", "boolean", "null"]}
    call: Schema = {"type": "object", "properties": {"name": TEXT, "arguments": arguments}, "required": ["name"]}
    calls: Schema = {"type": "object", "properties": {"function": call}, "required": ["function"]}
    others: dict[str, Schema] = {
        "name": name_or_null,
        "reasoning_content": name_or_null,
        "reasoning": {},
        "tool_call_id": name_or_null,
        "tool_calls": {"anyOf": [{"type": "array", "items": calls}, {"type": "null"}]},
        "function_call": {"anyOf": [call, {"type": "null"}]},
        "refusal": {},
        "annotations": {},
        "audio": {"type": "null"},
    }
    asks = {"enum": ["system", "developer", "user"]}
    answers = {"enum": ["assistant", "tool", "function"]}
    content: Schema = {"anyOf": [TEXT, parts | {"minItems": 1}]}
    no_content: Schema = {"anyOf": [TEXT, parts, {"type": "null"}]}
    return {
        "type": "array",
        "minItems": 1,
        "items": {
            "anyOf": [
                object_of(("role", "content"), role=asks, content=content, **others),
                object_of(("role",), role=answers, content=no_content, **others),
            ]
        },
    }
