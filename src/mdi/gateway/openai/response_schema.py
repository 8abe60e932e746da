"""The request of POST /v1/responses, and its form as a chat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from mdi.core.errors import InputError
from mdi.core.sampling import Flag, Number, TokenLimit, TopLogprobsCount
from mdi.core.unknown_fields import UnknownField
from mdi.core.values import checked_json, checked_text
from mdi.gateway.as_chat import AsChat, passed_fields
from mdi.gateway.openai.response_input import InputMessages
from mdi.gateway.openai.response_input_schema import FORMAT, INPUT, TOOL_CHOICE, TOOLS
from mdi.gateway.openai.schemas import IGNORED
from mdi.gateway.schemas import Body, Effort

UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "background": (False,),
    "conversation": (),
    "prompt": (),
    "image": (),
    "context_management": ([],),
}
WITHOUT_EFFECT = {*IGNORED, "max_tool_calls"}  # the latter limits OpenAI's own tools

MAX_METADATA, MAX_KEY, MAX_VALUE = 16, 64, 512
LOGPROBS = "message.output_text.logprobs"

Metadata = Annotated[
    dict[Annotated[str, Field(max_length=MAX_KEY)], Annotated[str, Field(max_length=MAX_VALUE)]],
    Field(max_length=MAX_METADATA),
]


class TextSettings(BaseModel):
    """format: text, json_object, or json_schema with its schema. verbosity changes nothing here."""

    model_config = ConfigDict(extra="allow")

    format: Annotated[dict[str, Any], WithJsonSchema(FORMAT)] | None = None
    verbosity: str | None = None


class Reasoning(BaseModel):
    """effort goes to the chat template. summary changes nothing: thoughts are given whole."""

    model_config = ConfigDict(extra="allow")

    effort: Effort | None = None
    summary: str | None = None
    generate_summary: str | None = None


class ResponsesRequest(Body):
    """POST /v1/responses. truncation: prompts are never cut, so that "auto" changes nothing."""

    model_config = ConfigDict(extra="allow")

    model: str
    input: Annotated[Any, WithJsonSchema(INPUT)]
    instructions: str | None = None
    previous_response_id: str | None = None
    tools: Annotated[list[Any], WithJsonSchema(TOOLS)] = Field(default_factory=list)
    tool_choice: Annotated[Any, WithJsonSchema(TOOL_CHOICE)] = "auto"
    parallel_tool_calls: Flag = True
    text: TextSettings = TextSettings()
    reasoning: Reasoning = Reasoning()
    max_output_tokens: TokenLimit = None
    temperature: Annotated[Number, Field(ge=0, le=100)] | None = None
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    top_logprobs: TopLogprobsCount = 0
    include: list[str] = Field(default_factory=list)
    store: Flag = True
    metadata: Metadata = Field(default_factory=dict)
    truncation: Literal["auto", "disabled"] = "disabled"
    stream: Flag = False
    stream_options: dict[str, Any] | None = None

    @property
    def wants_logprobs(self) -> bool:
        return LOGPROBS in self.include

    @property
    def items(self) -> Sequence[Any]:
        """The input as items. Raises InputError for what is neither a text nor a list."""
        if isinstance(self.input, str):
            return [{"role": "user", "content": checked_text(self.input, "input")}]
        if not isinstance(self.input, list) or not self.input:
            raise InputError("input must be a text, or a list of at least one item", "input")
        items: list[Any] = checked_json(self.input, "input")
        return items

    def as_chat(self, earlier: Sequence[Any], unknown: UnknownField) -> AsChat:
        """The request in the form of a chat. earlier: items of the previous responses."""
        extra = self._extra(unknown)
        messages = InputMessages(unknown)
        if self.instructions is not None:
            messages.instruct(self.instructions)
        messages.add(earlier, "previous_response_id")
        messages.add(self.items, "input")
        tools, tool_names = _tools(self.tools)
        body = extra | {
            "model": self.model,
            "messages": messages.messages,
            "max_completion_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "logprobs": self.wants_logprobs,
            "top_logprobs": self.top_logprobs if self.wants_logprobs else 0,
            "tools": tools,
            "tool_choice": _tool_choice(self.tool_choice),
            "parallel_tool_calls": self.parallel_tool_calls,
            "response_format": _response_format(self.text.format),
            "reasoning_effort": self.reasoning.effort,
        }
        return AsChat(body, NAMES | tool_names | messages.names)

    def _extra(self, unknown: UnknownField) -> dict[str, Any]:
        passed = passed_fields(self.model_extra, UNSUPPORTED, WITHOUT_EFFECT, unknown)
        for place, settings in (("text", self.text), ("reasoning", self.reasoning)):
            for field in settings.model_extra or ():
                unknown(f"{place}.{field}")
        return passed


NAMES = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
    "tool_choice.function": "tool_choice",
    "tool_choice.allowed_tools": "tool_choice",
    "reasoning_effort": "reasoning.effort",
}
"""A chat's names of places, and those of a response."""


def _tools(tools: Sequence[Any]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Function tools in the form of a chat, and the names of their places. Raises InputError for OpenAI's own tools."""
    names: dict[str, str] = {}
    made = []
    for index, tool in enumerate(tools):
        place = f"tools[{index}]"
        if not isinstance(tool, dict):
            raise InputError(f"{place} must be an object", place)
        if (kind := tool.get("type")) != "function":
            raise InputError(f"{place} of type {kind!r} is not supported: send tools of type function", f"{place}.type")
        made.append({"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}})
        names[f"{place}.function"] = place
    return made, names


def _tool_choice(choice: Any) -> Any:
    """A choice in the form of a chat. Raises InputError for a choice of OpenAI's own tools."""
    if not isinstance(choice, dict):
        return choice
    match choice.get("type"):
        case "function":
            return {"type": "function", "function": {"name": choice.get("name")}}
        case "allowed_tools":
            given = choice.get("tools")
            tools, _ = _tools(given if isinstance(given, list) else [])
            return {"type": "allowed_tools", "allowed_tools": {"mode": choice.get("mode"), "tools": tools}}
        case kind:
            raise InputError(
                f"tool_choice of type {kind!r} is not supported: choose one of the request's functions",
                "tool_choice.type",
            )


def _response_format(given: dict[str, Any] | None) -> dict[str, Any] | None:
    if given is None or given.get("type") != "json_schema":
        return given
    return {"type": "json_schema", "json_schema": {name: value for name, value in given.items() if name != "type"}}
