"""The requests of Anthropic's routes, and their form as a chat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from mdi.core.errors import InputError
from mdi.core.sampling import Flag, Integer, Number, StopStrings, TokenCount, TopK
from mdi.core.unknown_fields import UnknownField
from mdi.core.values import checked_json
from mdi.gateway.anthropic.content_schema import FORMAT, MESSAGES, SYSTEM, TOOLS
from mdi.gateway.anthropic.message_input import ChatMessages
from mdi.gateway.as_chat import AsChat, passed_fields
from mdi.gateway.schemas import Body, Effort

WITHOUT_EFFECT = frozenset(
    {"metadata", "service_tier", "cache_control", "inference_geo", "speed", "diagnostics", "user_profile_id"}
    | {"workspace_id", "betas"}
)
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {"container": (), "mcp_servers": ([],)}


class OutputConfig(BaseModel):
    """format: a JSON schema that the answer follows. effort goes to the chat template."""

    model_config = ConfigDict(extra="allow")

    effort: Effort | None = None
    format: Annotated[dict[str, Any], WithJsonSchema(FORMAT)] | None = None


class Thinking(BaseModel):
    """disabled asks models that think for answers without thoughts. A budget changes nothing."""

    model_config = ConfigDict(extra="allow")

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Integer | None = None
    display: str | None = None


class Choice(BaseModel):
    """Which tools the answer calls."""

    model_config = ConfigDict(extra="allow")

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: Flag = False


class CountRequest(Body):
    """POST /v1/messages/count_tokens: what decides the prompt."""

    model_config = ConfigDict(extra="allow")

    model: str
    messages: Annotated[list[Any], Field(min_length=1), WithJsonSchema(MESSAGES)]
    system: Annotated[Any, WithJsonSchema(SYSTEM)] | None = None
    tools: Annotated[list[Any], WithJsonSchema(TOOLS)] = Field(default_factory=list)
    tool_choice: Choice = Choice(type="auto")
    thinking: Thinking | None = None
    output_config: OutputConfig = OutputConfig()

    def as_chat(self, unknown: UnknownField) -> AsChat:
        """The request in the form of a chat."""
        extra = self._extra(unknown)
        messages = ChatMessages(unknown)
        if self.system is not None:
            messages.add_system(checked_json(self.system, "system"))
        for index, message in enumerate(checked_json(self.messages, "messages")):
            messages.add(message, f"messages[{index}]")
        if messages.continues and "tool_calls" in messages.messages[-1]:
            raise InputError(
                "the last message calls tools: send their results after it", f"messages[{len(self.messages) - 1}]"
            )
        tools, tool_names = _tools(self.tools, unknown)
        body = extra | {
            "model": self.model,
            "messages": messages.messages,
            "add_generation_prompt": not messages.continues,
            "continue_final_message": messages.continues,
            "tools": tools,
            "tool_choice": self._chosen(),
            "parallel_tool_calls": not self.tool_choice.disable_parallel_tool_use,
            "reasoning_effort": self._effort(),
            "response_format": _response_format(self.output_config.format),
        }
        return AsChat(body, NAMES | tool_names | messages.names)

    def _extra(self, unknown: UnknownField) -> dict[str, Any]:
        passed = passed_fields(self.model_extra, UNSUPPORTED, WITHOUT_EFFECT, unknown)
        for place, settings in (
            ("output_config", self.output_config),
            ("thinking", self.thinking),
            ("tool_choice", self.tool_choice),
        ):
            for field in (settings and settings.model_extra) or ():
                unknown(f"{place}.{field}")
        return passed

    def _chosen(self) -> Any:
        match self.tool_choice.type:
            case "any":
                return "required"
            case "tool":
                return {"type": "function", "function": {"name": self.tool_choice.name}}
            case other:
                return other

    def _effort(self) -> str | None:
        return "none" if self.thinking and self.thinking.type == "disabled" else self.output_config.effort


class MessagesRequest(CountRequest):
    """POST /v1/messages."""

    max_tokens: TokenCount
    temperature: Annotated[Number, Field(ge=0, le=100)] | None = None
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    top_k: TopK | None = None
    stop_sequences: StopStrings = ()
    stream: Flag = False

    def as_chat(self, unknown: UnknownField) -> AsChat:
        chat = super().as_chat(unknown)
        sampling = {name: getattr(self, name) for name in ("max_tokens", "temperature", "top_p", "top_k")}
        return AsChat({**chat.body, **sampling, "stop": list(self.stop_sequences)}, chat.names)


NAMES = {
    "stop": "stop_sequences",
    "tool_choice.function": "tool_choice",
    "reasoning_effort": "output_config.effort",
    "response_format.json_schema": "output_config.format",
    "response_format": "output_config.format",
}
"""A chat's names of places, and Anthropic's."""

TOOL_FIELDS = ("name", "description", "input_schema", "strict")
WITHOUT_EFFECT_ON_TOOLS = (
    *("type", "cache_control", "allowed_callers", "defer_loading", "eager_input_streaming", "input_examples"),
)


def _tools(tools: Sequence[Any], unknown: UnknownField) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Tools in the form of a chat, and the names of their places. Raises InputError for Anthropic's own tools."""
    names: dict[str, str] = {}
    made = []
    for index, tool in enumerate(tools):
        place = f"tools[{index}]"
        if not isinstance(tool, dict):
            raise InputError(f"{place} must be an object", place)
        if (kind := tool.get("type")) not in (None, "custom"):
            raise InputError(f"{place} of type {kind!r} is not supported: send tools of type custom", f"{place}.type")
        for name in tool:
            if name not in (*TOOL_FIELDS, *WITHOUT_EFFECT_ON_TOOLS):
                unknown(f"{place}.{name}")
        function = {name: tool[name] for name in TOOL_FIELDS if name in tool}
        if "input_schema" in function:
            function["parameters"] = function.pop("input_schema")
        made.append({"type": "function", "function": function})
        names |= {f"{place}.function": place, f"{place}.function.parameters": f"{place}.input_schema"}
    return made, names


def _response_format(given: dict[str, Any] | None) -> dict[str, Any] | None:
    if given is None:
        return None
    named = {"name": "output"} | {name: value for name, value in given.items() if name != "type"}
    return {"type": given.get("type"), "json_schema": named}
