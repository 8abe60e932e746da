"""The requests of OpenAI's routes."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from mdi.core.errors import InputError
from mdi.core.sampling import MAX_SAMPLES, SamplingParams, TokenCount, TopLogprobsCount
from mdi.gateway.schemas import GatewayRequest

IGNORED = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "parallel_tool_calls",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "prompt_cache_options",
        "reasoning_effort",
        "verbosity",
    }
)
"""OpenAI's fields that change nothing about an answer here."""

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "moderation": (None,),
    "web_search_options": (None,),
    "echo": (None, False),
    "suffix": (None, ""),
    "best_of": (None, 1),
}
"""OpenAI's fields that would change the answer and are not supported, with the values that have no effect."""


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class OpenAIRequest(GatewayRequest):
    """The fields of both routes. `IGNORED` fields may have any value, `UNSUPPORTED` ones only values without effect."""

    model_config = ConfigDict(extra="allow")

    model: str
    stream_options: StreamOptions | None = None

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def params(self, **changes: Any) -> SamplingParams:
        """Raises InputError for fields that are unknown or not supported."""
        for field, value in (self.model_extra or {}).items():
            if field in IGNORED or value in UNSUPPORTED.get(field, ()):
                continue
            raise InputError(f"{field} is not supported" if field in UNSUPPORTED else f"unknown field {field}", field)
        return super().params(**changes)


class ChatRequest(OpenAIRequest):
    """POST /v1/chat/completions. max_completion_tokens is OpenAI's newer name of max_tokens and overrides it."""

    messages: list[dict[str, Any]]
    max_completion_tokens: TokenCount | None = None
    logprobs: bool | None = None

    def params(self, **changes: Any) -> SamplingParams:
        if self.top_logprobs and not self.logprobs:
            raise InputError("top_logprobs needs logprobs to be true", "top_logprobs")
        return super().params(max_tokens=self.max_completion_tokens or self.max_tokens, **changes)


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class CompletionRequest(OpenAIRequest):
    """POST /v1/completions. logprobs: how many of the likeliest tokens to report; 0 reports the drawn ones alone."""

    prompt: Annotated[
        list[str],
        BeforeValidator(_as_list, json_schema_input_type=str | list[str]),
        Field(min_length=1, max_length=MAX_SAMPLES),
    ]
    max_tokens: TokenCount | None = 16
    top_logprobs: TopLogprobsCount = Field(0, alias="logprobs")

    @property
    def wants_logprobs(self) -> bool:
        return "top_logprobs" in self.model_fields_set
