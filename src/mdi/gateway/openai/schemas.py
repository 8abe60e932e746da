"""The requests of OpenAI's routes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, WithJsonSchema

from mdi.core.errors import InputError
from mdi.core.sampling import Flag, SamplingParams, TokenLimit
from mdi.core.template_settings import TemplateSettings
from mdi.core.tools import parse_choice, parse_function_call, parse_functions, parse_tools
from mdi.core.unknown_fields import UnknownField
from mdi.gateway.media_settings import MediaSettings
from mdi.gateway.message_schema import TEMPLATE_SETTINGS, messages_schema
from mdi.gateway.openai.response_format import ConstrainedRequest
from mdi.gateway.schemas import Effort
from mdi.gateway.tool_schema import FUNCTION_CALL, FUNCTIONS, TOOL_CHOICE, TOOLS
from mdi.gateway.tool_use import ToolUse

IGNORED = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "prompt_cache_options",
        "verbosity",
    }
)
"""OpenAI's fields that change nothing about an answer here."""

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    # of chats, on completions
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    # of OpenAI
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "moderation": (),
    "web_search_options": (),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
    # of other servers
    "grammar": ("",),
    "format": ("",),
    "documents": ([],),
    "chat_template": (),
    "add_special_tokens": (),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "allowed_token_ids": (),
    "bad_words": ([],),
}
"""Fields that would change the answer and are not supported, with the values, beside null, that have no effect."""


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="allow")

    include_usage: Flag | None = None
    continuous_usage_stats: Flag | None = None
    include_obfuscation: Flag | None = None


class OpenAIRequest(ConstrainedRequest):
    """The fields of both routes. `IGNORED` fields may have any value, `UNSUPPORTED` ones only values without effect."""

    model_config = ConfigDict(extra="allow")

    model: str
    stream_options: StreamOptions | None = None
    return_token_ids: Flag = False

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def wants_usage_so_far(self) -> bool:
        """Whether each chunk of a stream has the usage so far, as vLLM's with both options."""
        return self.wants_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)

    def check_fields(self, unknown: UnknownField) -> None:
        """Calls `unknown` with each unknown field. Raises InputError for fields that are not supported."""
        for field, value in (self.model_extra or {}).items():
            if field in UNSUPPORTED:
                check_without_effect(field, value, UNSUPPORTED[field])
            elif field not in IGNORED:
                unknown(field)
        self.check_constraint_fields(unknown)
        for field in (self.stream_options and self.stream_options.model_extra) or ():
            unknown(f"stream_options.{field}")


def check_without_effect(field: str, value: Any, allowed: Sequence[Any]) -> None:
    """Raises InputError for a value, beside null, that is none of the allowed ones: those that ask for nothing."""
    if value is not None and value not in allowed:
        choices = "".join(f", or send {json.dumps(choice)}" for choice in allowed)
        raise InputError(f"{field} is not supported: leave it out{choices}", field)


class ChatRequest(OpenAIRequest):
    """POST /v1/chat/completions. max_completion_tokens is OpenAI's newer name of max_tokens and overrides it.

    add_generation_prompt, continue_final_message: see `Conversation`. mm_processor_kwargs: see `MediaSettings`.
    tools, tool_choice: see `core.tools`; functions and function_call are their older forms. reasoning_effort: a setting
    for the chat template; none is enable_thinking false. include_reasoning: whether thoughts are sent.
    """

    messages: Annotated[list[dict[str, Any]], WithJsonSchema(messages_schema(strict=False))]
    max_completion_tokens: TokenLimit = None
    logprobs: Flag | None = None
    chat_template_kwargs: Annotated[dict[str, Any], WithJsonSchema(TEMPLATE_SETTINGS)] | None = None
    add_generation_prompt: Flag = True
    continue_final_message: Flag = False
    mm_processor_kwargs: MediaSettings | None = None
    tools: Annotated[Any, WithJsonSchema(TOOLS)] = None
    tool_choice: Annotated[Any, WithJsonSchema(TOOL_CHOICE)] = None
    parallel_tool_calls: Flag = True
    functions: Annotated[Any, WithJsonSchema(FUNCTIONS)] = None
    function_call: Annotated[Any, WithJsonSchema(FUNCTION_CALL)] = None
    reasoning_effort: Effort | None = None
    include_reasoning: Flag = True

    def tool_use(self, unknown: UnknownField) -> ToolUse:
        """The tools of the request. Raises InputError, naming the field, for malformed ones."""
        tools = parse_tools([] if self.tools is None else self.tools, unknown)
        functions = parse_functions([] if self.functions is None else self.functions, unknown)
        if tools and functions:
            raise InputError("functions is the older form of tools: send one of them", "functions")
        function_call = parse_function_call(self.function_call, functions)
        if functions:
            return ToolUse(functions, function_call)
        return ToolUse(tools, parse_choice(self.tool_choice, tools, parallel=self.parallel_tool_calls))

    @property
    def template_settings(self) -> TemplateSettings:
        """Settings for the chat template."""
        effort: dict[str, Any] = {}
        if self.reasoning_effort is not None:
            effort = {"reasoning_effort": self.reasoning_effort}
            if self.reasoning_effort == "none":
                effort["enable_thinking"] = False
        return effort | (self.chat_template_kwargs or {})

    def params(self, **changes: Any) -> SamplingParams:
        if self.top_logprobs and not self.logprobs:
            raise InputError("top_logprobs needs logprobs to be true", "top_logprobs")
        newer = "max_completion_tokens" in self.model_fields_set
        return super().params(max_tokens=self.max_completion_tokens if newer else self.max_tokens, **changes)
