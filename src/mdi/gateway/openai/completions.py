"""POST /v1/completions, of one or several prompts."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from mdi.core.config import GatewayConfig
from mdi.core.constraint import Constraint
from mdi.core.errors import InputError
from mdi.core.messages import RawText, TokenIds
from mdi.core.outputs import Piece, Sample, Timing, Usage
from mdi.core.sampling import SamplingParams
from mdi.gateway.engine import Submitted, TextEngine
from mdi.gateway.json_body import JSONRoute
from mdi.gateway.openai.answer import answer, stop_reason
from mdi.gateway.openai.completion_schema import CompletionRequest
from mdi.gateway.openai.ignored import IgnoredFields
from mdi.gateway.openai.logprobs import TextLogprobs, joined
from mdi.gateway.openai.models import ServedModel


def router(engine: TextEngine, served: ServedModel, config: GatewayConfig) -> APIRouter:
    routes = APIRouter(route_class=JSONRoute)

    @routes.post("/completions")
    async def completions(request: Request, body: CompletionRequest) -> Response:
        served.check(body.model)
        ignored = IgnoredFields(config.strict_requests)
        body.check_fields(ignored)
        prompts = body.prompts
        running = _submit_all(engine, prompts, body.params(prompt_logprobs=body.prompt_logprobs_count), body.constraint)
        choices = TextChoices(
            running,
            TextLogprobs(engine, body.skip_special_tokens) if body.wants_logprobs else None,
            [_text(engine, prompt) for prompt in prompts.values()] if body.echo else None,
            shows_ids=body.return_token_ids,
        )
        response = await answer(request, body, running, choices, served.name, config.request_timeout_s)
        response.headers.update(ignored.headers)
        return response

    return routes


def _text(engine: TextEngine, prompt: RawText | TokenIds) -> str:
    return prompt.text if isinstance(prompt, RawText) else engine.detokenize(prompt.ids)


def _submit_all(
    engine: TextEngine,
    prompts: Mapping[str, RawText | TokenIds],
    params: SamplingParams,
    constraint: Constraint | None,
) -> _Joined:
    """Starts one request for each prompt; if one is refused, none runs."""
    joined = _Joined([], params.n)
    try:
        for place, prompt in prompts.items():
            with _named(place):
                joined.parts.append(engine.submit(prompt, params, constraint=constraint))
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

    parts: list[Submitted]
    n: int

    @property
    def usage(self) -> Usage:
        each = [part.usage for part in self.parts]
        return Usage(
            sum(usage.prompt_tokens for usage in each),
            sum(usage.completion_tokens for usage in each),
            sum(usage.cached_tokens for usage in each),
        )

    @property
    def timing(self) -> Timing:
        return Timing.of_all([part.timing for part in self.parts])

    async def __aiter__(self) -> AsyncIterator[Piece]:
        for number, part in enumerate(self.parts):
            async for piece in part:
                yield replace(piece, index=number * self.n + piece.index)

    def cancel(self) -> None:
        for part in self.parts:
            part.cancel()


class TextChoices:
    """Choices of one completion. echoed: the prompts' texts, which the choices begin with; None for none of them.

    shows_ids: whether to give token ids, as vLLM does: those of the prompt with the first part of each choice.
    """

    id_prefix = "cmpl"
    kind = "text_completion"
    chunk_kind = kind

    def __init__(
        self, running: _Joined, logprobs: TextLogprobs | None, echoed: Sequence[str] | None, *, shows_ids: bool
    ) -> None:
        self._running = running
        self._logprobs = logprobs
        self._echoed = echoed
        self._shows_ids = shows_ids
        self._started: set[int] = set()

    def completion_details(self) -> dict[str, Any]:
        return {}

    def shared(self) -> dict[str, Any]:
        return {}

    def whole(self, index: int, part: Sample | Piece) -> dict[str, Any]:
        first = index not in self._started
        self._started.add(index)
        number = index // self._running.n
        echoed = self._echoed[number] if first and self._echoed else ""
        choice: dict[str, Any] = {
            "index": index,
            "text": echoed + part.text,
            "logprobs": self._logprobs and self._logprobs_of(self._logprobs, index, part, echoed),
            "finish_reason": part.finish_reason,
        }
        choice |= stop_reason(part)
        if self._shows_ids:
            choice["token_ids"] = [token.id for token in part.tokens]
            if first:
                choice["prompt_token_ids"] = self._running.parts[number].prompt_token_ids
        return choice

    def _logprobs_of(self, logprobs: TextLogprobs, index: int, part: Sample | Piece, echoed: str) -> dict[str, Any]:
        if not echoed:
            return logprobs.of(index, part)
        asked = self._running.parts[index // self._running.n]
        before = logprobs.of_prompt(index, echoed, asked.prompt_token_ids, asked.prompt_logprobs)
        return joined(before, logprobs.of(index, part))

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        return [self.whole(piece.index, piece)]
