"""POST /v1/completions, of one or several prompts."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from mdi.core.config import GatewayConfig
from mdi.core.errors import InputError
from mdi.core.messages import RawText, TokenIds
from mdi.core.outputs import Piece, Sample, Usage
from mdi.core.sampling import SamplingParams
from mdi.gateway.engine import Running, TextEngine
from mdi.gateway.json_body import JSONRoute
from mdi.gateway.openai.answer import answer
from mdi.gateway.openai.ignored import IgnoredFields
from mdi.gateway.openai.logprobs import LogprobsOf, no_logprobs, text_logprobs
from mdi.gateway.openai.models import ServedModel
from mdi.gateway.openai.schemas import CompletionRequest


def router(engine: TextEngine, served: ServedModel, config: GatewayConfig) -> APIRouter:
    routes = APIRouter(route_class=JSONRoute)

    @routes.post("/completions")
    async def completions(request: Request, body: CompletionRequest) -> Response:
        served.check(body.model)
        ignored = IgnoredFields(config.strict_requests)
        body.check_fields(ignored)
        running = _submit_all(engine, body.prompt, body.params())
        choices = TextChoices(text_logprobs(engine, body.skip_special_tokens) if body.wants_logprobs else no_logprobs)
        response = await answer(request, body, running, choices, engine.model_name, config.request_timeout_s)
        response.headers.update(ignored.headers)
        return response

    return routes


def _submit_all(engine: TextEngine, prompts: Mapping[str, RawText | TokenIds], params: SamplingParams) -> Running:
    """Starts one request for each prompt; if one is refused, none runs."""
    joined = _Joined([], params.n)
    try:
        for place, prompt in prompts.items():
            with _named(place):
                joined.parts.append(engine.submit(prompt, params))
    except BaseException:
        joined.cancel()
        raise
    return joined


@contextmanager
def _named(place: str) -> Iterator[None]:
    """Errors of a prompt name its place in the request."""
    try:
        yield
    except InputError as error:
        if error.field and error.field.startswith("prompt"):
            error.field = place + error.field.removeprefix("prompt")
        raise


@dataclass(frozen=True)
class _Joined:
    """Several running requests of `n` samples each as one: their pieces in the order of the requests, numbered on."""

    parts: list[Running]
    n: int

    @property
    def usage(self) -> Usage:
        each = [part.usage for part in self.parts]
        return Usage(
            sum(usage.prompt_tokens for usage in each),
            sum(usage.completion_tokens for usage in each),
            sum(usage.cached_tokens for usage in each),
        )

    async def __aiter__(self) -> AsyncIterator[Piece]:
        for number, part in enumerate(self.parts):
            async for piece in part:
                yield replace(piece, index=number * self.n + piece.index)

    def cancel(self) -> None:
        for part in self.parts:
            part.cancel()


class TextChoices:
    """Choices of one completion."""

    id_prefix = "cmpl"
    kind = "text_completion"
    chunk_kind = kind

    def __init__(self, logprobs_of: LogprobsOf) -> None:
        self._logprobs_of = logprobs_of

    def whole(self, index: int, part: Sample | Piece) -> dict[str, Any]:
        logprobs = self._logprobs_of(index, part)
        return {"index": index, "text": part.text, "logprobs": logprobs, "finish_reason": part.finish_reason}

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        return [self.whole(piece.index, piece)]
