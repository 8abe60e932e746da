"""The requests as they come over HTTP, checked in form; ranges are `SamplingParams`' business. Knows no routes."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from mdi.core.errors import InputError
from mdi.core.sampling import MAX_SAMPLES, Integer, SampleCount, SamplingParams, TokenCount, TopLogprobsCount


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Strings = Annotated[list[str], BeforeValidator(_as_list, json_schema_input_type=str | list[str])]

NOT_AN_OBJECT = "the body must be a JSON object, sent with Content-Type: application/json"

DEFAULT_FOR_NULL = {name for name, field in SamplingParams.model_fields.items() if field.default is not None} | {
    "logprobs"
}
"""Fields where null stands for the default."""

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
"""OpenAI's fields that would change the answer and are not supported, with the values that ask for nothing."""


class _Request(SamplingParams):
    """The fields that all routes share."""

    min_pixels: Integer | None = None
    max_pixels: Integer | None = None
    stream: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _with_defaults(cls, body: Any) -> dict[str, Any]:
        if not isinstance(body, dict):
            raise InputError(NOT_AN_OBJECT)
        return {name: value for name, value in body.items() if value is not None or name not in DEFAULT_FOR_NULL}

    def params(self, **changes: Any) -> SamplingParams:
        return SamplingParams(**{name: getattr(self, name) for name in SamplingParams.model_fields} | changes)


class _Generate(_Request):
    n: SampleCount = Field(1, alias="n_samples")
    top_logprobs: ClassVar[int] = 0  # type: ignore[misc]  # the answers have none: an unknown field here


class GenerateRequest(_Generate):
    """POST /generate."""

    prompt: str


class MultimodalRequest(_Generate):
    """POST /generate/multimodal: messages as the engine takes them."""

    messages: list[dict[str, Any]]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class _OpenAI(_Request):
    """OpenAI's fields: `IGNORED` ones may have any value, `UNSUPPORTED` ones only values without an effect."""

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


class ChatRequest(_OpenAI):
    """POST /v1/chat/completions. max_completion_tokens is OpenAI's newer name of max_tokens and overrides it."""

    messages: list[dict[str, Any]]
    max_completion_tokens: TokenCount | None = None
    logprobs: bool | None = None

    def params(self, **changes: Any) -> SamplingParams:
        if self.top_logprobs and not self.logprobs:
            raise InputError("top_logprobs needs logprobs to be true", "top_logprobs")
        return super().params(max_tokens=self.max_completion_tokens or self.max_tokens, **changes)


class CompletionRequest(_OpenAI):
    """POST /v1/completions. logprobs: how many of the likeliest tokens to report; 0 reports the drawn ones alone."""

    prompt: Annotated[Strings, Field(min_length=1, max_length=MAX_SAMPLES)]
    max_tokens: TokenCount | None = 16
    top_logprobs: TopLogprobsCount = Field(0, alias="logprobs")

    @property
    def wants_logprobs(self) -> bool:
        return "top_logprobs" in self.model_fields_set
