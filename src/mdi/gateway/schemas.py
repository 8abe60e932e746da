"""The requests as they come over HTTP, checked in form; ranges are `SamplingParams`' business."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from mdi.errors import InputError
from mdi.params import SamplingParams

Number = Annotated[float, Field(strict=True)]
Count = Annotated[int, Field(strict=True)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Sampling(BaseModel):
    """The settings all routes share."""

    temperature: Number | None = None
    top_k: Count | None = None
    top_p: Number | None = None
    min_p: Number | None = None
    seed: Count | None = None
    stop: str | list[str] | None = None
    min_pixels: Count | None = None
    max_pixels: Count | None = None
    stream: bool = False

    def _params(self, *, max_tokens: int | None, n: int) -> SamplingParams:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            seed=self.seed,
            stop=tuple(stop),
            n=n,
        )


class _Generate(_Sampling, _Strict):
    max_tokens: Count | None = None
    n_samples: Count = 1

    def params(self) -> SamplingParams:
        return self._params(max_tokens=self.max_tokens, n=self.n_samples)


class GenerateRequest(_Generate):
    """POST /generate."""

    prompt: str


class MultimodalRequest(_Generate):
    """POST /generate/multimodal: messages as the engine takes them."""

    messages: list[dict[str, Any]]


class StreamOptions(BaseModel):
    include_usage: bool = False


class _OpenAI(_Sampling):
    """Fields of OpenAI's that change nothing here are ignored; what would change the answer is refused."""

    model_config = ConfigDict(extra="ignore")

    model: str
    n: Count | None = None
    stream_options: StreamOptions | None = None
    frequency_penalty: Number | None = None
    presence_penalty: Number | None = None
    logit_bias: dict[str, float] | None = None

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def _refuse_unsupported(self) -> None:
        for field in ("frequency_penalty", "presence_penalty", "logit_bias"):
            if getattr(self, field):
                raise InputError(f"{field} is not supported", field)


class ChatRequest(_OpenAI):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    tools: list[Any] | None = None
    response_format: dict[str, Any] | None = None

    def params(self) -> SamplingParams:
        """Raises InputError for what is asked for and not supported."""
        self._refuse_unsupported()
        for field in ("tools", "logprobs"):
            if getattr(self, field):
                raise InputError(f"{field} is not supported", field)
        if (self.response_format or {}).get("type", "text") != "text":
            raise InputError("response_format is not supported, but for text", "response_format")
        max_tokens = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return self._params(max_tokens=max_tokens, n=1 if self.n is None else self.n)


class CompletionRequest(_OpenAI):
    """POST /v1/completions."""

    prompt: str | list[str]
    max_tokens: Count | None = 16
    echo: Literal[False] | None = None
    suffix: None = None
    best_of: Count | None = None

    def params(self) -> SamplingParams:
        """Raises InputError for what is asked for and not supported."""
        self._refuse_unsupported()
        return self._params(max_tokens=self.max_tokens, n=1 if self.n is None else self.n)
