"""The requests of OpenAI's routes."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema

from mdi.core.errors import InputError
from mdi.core.messages import RawText, TokenIds
from mdi.core.sampling import MAX_SAMPLES, Flag, SamplingParams, TokenLimit, TopLogprobsCount
from mdi.core.unknown_fields import UnknownField
from mdi.core.values import as_whole, checked_text
from mdi.gateway.message_schema import TEMPLATE_SETTINGS, messages_schema
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
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "moderation": (),
    "web_search_options": (),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
    # of other servers
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "grammar": ("",),
    "format": ("",),
    "documents": ([],),
    "chat_template": (),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "add_special_tokens": (),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "include_stop_str_in_output": (False,),
    "allowed_token_ids": (),
    "bad_words": ([],),
}
"""Fields that would change the answer and are not supported, with the values, beside null, that have no effect."""


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="allow")

    include_usage: Flag | None = None
    include_obfuscation: Flag | None = None


class OpenAIRequest(GatewayRequest):
    """The fields of both routes. `IGNORED` fields may have any value, `UNSUPPORTED` ones only values without effect."""

    model_config = ConfigDict(extra="allow")

    model: str
    stream_options: StreamOptions | None = None

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def check_fields(self, unknown: UnknownField) -> None:
        """Calls `unknown` with each unknown field. Raises InputError for fields that are not supported."""
        for field, value in (self.model_extra or {}).items():
            if field in UNSUPPORTED:
                _check_without_effect(field, value)
            elif field not in IGNORED:
                unknown(field)
        for field in (self.stream_options and self.stream_options.model_extra) or ():
            unknown(f"stream_options.{field}")


def _check_without_effect(field: str, value: Any) -> None:
    if value is not None and value not in UNSUPPORTED[field]:
        choices = "".join(f", or send {json.dumps(choice)}" for choice in UNSUPPORTED[field])
        raise InputError(f"{field} is not supported: leave it out{choices}", field)


class ChatRequest(OpenAIRequest):
    """POST /v1/chat/completions. max_completion_tokens is OpenAI's newer name of max_tokens and overrides it."""

    messages: Annotated[list[dict[str, Any]], WithJsonSchema(messages_schema(strict=False))]
    max_completion_tokens: TokenLimit = None
    logprobs: Flag | None = None
    chat_template_kwargs: Annotated[dict[str, Any], WithJsonSchema(TEMPLATE_SETTINGS)] | None = None

    def params(self, **changes: Any) -> SamplingParams:
        if self.top_logprobs and not self.logprobs:
            raise InputError("top_logprobs needs logprobs to be true", "top_logprobs")
        newer = "max_completion_tokens" in self.model_fields_set
        return super().params(max_tokens=self.max_completion_tokens if newer else self.max_tokens, **changes)


def _prompts(given: Any) -> dict[str, RawText | TokenIds]:
    """One prompt or several, by their places in the request: each is a text or a list of token ids."""
    if isinstance(given, str) or (isinstance(given, list) and given and isinstance(given[0], (int, float))):
        return {"prompt": _prompt(given, "prompt")}
    if not isinstance(given, list) or not 1 <= len(given) <= MAX_SAMPLES:
        raise InputError(
            f"prompt must be a text, a list of token ids, or a list of 1 to {MAX_SAMPLES} of these", "prompt"
        )
    places = [f"prompt[{number}]" for number in range(len(given))]
    return {place: _prompt(prompt, place) for place, prompt in zip(places, given, strict=True)}


def _prompt(given: Any, path: str) -> RawText | TokenIds:
    if isinstance(given, str):
        return RawText(checked_text(given, path))
    if not isinstance(given, list):
        raise InputError(f"{path} must be a text or a list of token ids", path)
    ids = tuple(map(as_whole, given))
    for index, token in enumerate(ids):
        if isinstance(token, bool) or not isinstance(token, int):
            raise InputError(f"{path}[{index}] must be a token id, which is a whole number", f"{path}[{index}]")
    return TokenIds(ids)


PromptText = Annotated[str, Field(min_length=1)]
PromptIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
Prompts = Annotated[list[PromptText | PromptIds], Field(min_length=1, max_length=MAX_SAMPLES)]


class CompletionRequest(OpenAIRequest):
    """POST /v1/completions. logprobs: how many of the likeliest tokens to report; 0 reports the drawn ones alone."""

    prompt: Annotated[
        dict[str, RawText | TokenIds],
        PlainValidator(_prompts, json_schema_input_type=PromptText | PromptIds | Prompts),
    ]
    max_tokens: TokenLimit = 16
    top_logprobs: TopLogprobsCount = Field(0, alias="logprobs")

    @property
    def wants_logprobs(self) -> bool:
        return "top_logprobs" in self.model_fields_set
