"""The requests as they come over HTTP, checked in form; ranges are `SamplingParams`' business. Knows no routes."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from mdi.core.errors import InputError
from mdi.core.sampling import MAX_SAMPLES, SamplingParams


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _encodable(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """JSON can spell half a surrogate pair, which is no text and which no tokenizer or encoder takes."""
    left: list[Any] = [messages]
    while left:
        match left.pop():
            case dict() as fields:
                left += [*fields.keys(), *fields.values()]
            case list() as items:
                left += items
            case str() as text if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
                raise ValueError("text holds half of a surrogate pair")
    return messages


Number = Annotated[float, Field(strict=True)]
Count = Annotated[int, Field(strict=True)]
Strings = Annotated[list[str], BeforeValidator(_as_list, json_schema_input_type=str | list[str])]
Messages = Annotated[list[dict[str, Any]], AfterValidator(_encodable)]

PART_FIELDS = {
    "text": {"type", "text"},
    "image": {"type", "image", "min_pixels", "max_pixels"},
    "video": {"type", "video", "min_pixels", "max_pixels", "total_pixels", "fps", "nframes"},
}
"""What the parts of a message may have, by their type."""

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


class _Sampling(BaseModel):
    """The settings all routes share."""

    temperature: Number | None = None
    top_k: Count | None = None
    top_p: Number | None = None
    min_p: Number | None = None
    repetition_penalty: Number | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    logit_bias: dict[int, Number] | None = None
    stop_token_ids: list[Count] | None = None
    ignore_eos: bool | None = None
    min_tokens: Count | None = None
    seed: Count | None = None
    stop: Strings | None = None
    min_pixels: Count | None = None
    max_pixels: Count | None = None
    stream: bool | None = None

    def _params(
        self,
        *,
        max_tokens: int | None,
        n: int | None,
        top_logprobs: int | None = None,
        names: Mapping[str, str] = MappingProxyType({}),
    ) -> SamplingParams:
        """names: what the request calls a setting, where that is not our name."""
        try:
            return SamplingParams(
                max_tokens=max_tokens,
                temperature=self.temperature,
                top_k=self.top_k,
                top_p=self.top_p,
                min_p=self.min_p,
                repetition_penalty=self.repetition_penalty,
                presence_penalty=self.presence_penalty or 0.0,
                frequency_penalty=self.frequency_penalty or 0.0,
                logit_bias=self.logit_bias or {},
                stop_token_ids=self.stop_token_ids or (),
                ignore_eos=self.ignore_eos or False,
                min_tokens=self.min_tokens or 0,
                top_logprobs=top_logprobs or 0,
                seed=self.seed,
                stop=self.stop or (),
                n=1 if n is None else n,
            )
        except InputError as error:
            if error.field is None or error.field not in names:
                raise
            name = names[error.field]
            raise InputError(str(error).replace(error.field, name, 1), name) from None


class _Generate(_Sampling):
    model_config = ConfigDict(extra="forbid")

    max_tokens: Count | None = None
    n_samples: Count = 1

    def params(self) -> SamplingParams:
        return self._params(max_tokens=self.max_tokens, n=self.n_samples, names={"n": "n_samples"})


class GenerateRequest(_Generate):
    """POST /generate."""

    prompt: str


class MultimodalRequest(_Generate):
    """POST /generate/multimodal: messages as the engine takes them."""

    messages: Messages


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class _OpenAI(_Sampling):
    """OpenAI's fields: `IGNORED` ones may say anything, `UNSUPPORTED` ones nothing, others are refused by name."""

    model_config = ConfigDict(extra="allow")

    model: str
    max_tokens: Count | None = None
    n: Count | None = None
    stream_options: StreamOptions | None = None

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def _check_extras(self) -> None:
        for field, value in (self.model_extra or {}).items():
            if field in IGNORED or value in UNSUPPORTED.get(field, ()):
                continue
            raise InputError(f"{field} is not supported" if field in UNSUPPORTED else f"unknown field {field}", field)


class ChatRequest(_OpenAI):
    """POST /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Count | None = None

    def params(self) -> SamplingParams:
        """Raises InputError for what is asked for and not supported."""
        self._check_extras()
        if self.top_logprobs and not self.logprobs:
            raise InputError("top_logprobs needs logprobs to be true", "top_logprobs")
        if self.max_completion_tokens is None:
            return self._params(max_tokens=self.max_tokens, n=self.n, top_logprobs=self.top_logprobs)
        return self._params(
            max_tokens=self.max_completion_tokens,
            n=self.n,
            top_logprobs=self.top_logprobs,
            names={"max_tokens": "max_completion_tokens"},
        )


class CompletionRequest(_OpenAI):
    """POST /v1/completions."""

    prompt: Annotated[Strings, Field(min_length=1, max_length=MAX_SAMPLES)]
    max_tokens: Count | None = 16
    logprobs: Count | None = None

    def params(self) -> SamplingParams:
        """Raises InputError for what is asked for and not supported."""
        self._check_extras()
        names = {"top_logprobs": "logprobs"}
        return self._params(max_tokens=self.max_tokens, n=self.n, top_logprobs=self.logprobs, names=names)
