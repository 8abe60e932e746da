"""The JSON of Anthropic's routes, for the OpenAPI document."""

from __future__ import annotations

from typing import Any, Literal

from typing_extensions import TypedDict

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class TextBlock(TypedDict):
    type: Literal["text"]
    text: str


class ThinkingBlock(TypedDict):
    type: Literal["thinking"]
    thinking: str
    signature: str


class ToolUseBlock(TypedDict):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class MessageUsage(TypedDict):
    """input_tokens: of the prompt, without those from the cache."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class MessageObject(TypedDict):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[TextBlock | ThinkingBlock | ToolUseBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage


class _Event(TypedDict):
    type: str


class MessageEvent(_Event, total=False):
    """An event: its type says which of the other fields it has, as in Anthropic's."""

    message: MessageObject
    index: int
    content_block: TextBlock | ThinkingBlock | ToolUseBlock
    delta: dict[str, Any]
    usage: MessageUsage


class TokenCount(TypedDict):
    input_tokens: int


class AnthropicErrorDetails(TypedDict):
    type: str
    message: str


class AnthropicError(TypedDict):
    """An error of Anthropic's routes."""

    type: Literal["error"]
    error: AnthropicErrorDetails
