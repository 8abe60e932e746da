"""POST /tokenize and POST /detokenize, as in vLLM: what a prompt is made of, without an answer."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import ConfigDict, WithJsonSchema
from starlette.responses import Response

from mdi.core.config import GatewayConfig
from mdi.core.errors import InputError
from mdi.core.messages import RawText
from mdi.core.sampling import TOKEN_ID_SCHEMA, Flag, Integer
from mdi.core.values import checked_text
from mdi.gateway.engine import Submitted, TextEngine
from mdi.gateway.json_body import JSONRoute
from mdi.gateway.json_text import JsonAnswer
from mdi.gateway.message_schema import messages_schema
from mdi.gateway.openai.chat import chat_prompt
from mdi.gateway.openai.ignored import IgnoredFields
from mdi.gateway.openai.logprobs import token_name
from mdi.gateway.openai.models import ServedModel
from mdi.gateway.openai.schemas import ChatRequest
from mdi.gateway.schemas import Body
from mdi.gateway.streaming import completion


class TokenizeRequest(ChatRequest):
    """POST /tokenize: a prompt, or messages with all that a chat may have beside them.

    add_special_tokens: whether the tokenizer adds its own to a prompt, such as BOS; a chat template adds those of
    messages. return_token_strs: whether to give each token's text, too.
    """

    model: str | None = None  # type: ignore[assignment]
    messages: Annotated[list[dict[str, Any]], WithJsonSchema(messages_schema(strict=False))] | None = None  # type: ignore[assignment]
    prompt: str | None = None
    add_special_tokens: Flag | None = None
    return_token_strs: Flag = False


OF_PROMPTS = {"model", "prompt", "add_special_tokens", "return_token_strs"}


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    tokens: Annotated[list[Integer], WithJsonSchema({"type": "array", "items": TOKEN_ID_SCHEMA})]


def router(engine: TextEngine, served: ServedModel, config: GatewayConfig) -> APIRouter:
    routes = APIRouter(route_class=JSONRoute)

    @routes.post("/tokenize")
    async def tokenize(request: Request, body: TokenizeRequest) -> Response:
        """The token ids of a prompt, also of one that no answer would fit behind.

        Images and videos are decoded for the number of their tokens, not encoded.
        """
        ignored = _checked(served, config, body.model)
        body.check_fields(ignored)
        running = _prepared(engine, body, ignored)
        await completion(request, running, config.request_timeout_s)
        ids = running.prompt_token_ids
        limits = {"count": len(ids), "max_model_len": engine.capabilities.max_model_len}
        names = {"token_strs": [token_name(engine.token_bytes(token)) for token in ids]}
        answer = limits | {"tokens": ids} | (names if body.return_token_strs else {})
        return JsonAnswer(answer, headers=ignored.headers)

    @routes.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> Response:
        """The text of token ids, special tokens by their names."""
        ignored = _checked(served, config, body.model)
        for name in body.model_extra or ():
            ignored(name)
        text = await asyncio.to_thread(engine.detokenize, body.tokens)
        return JsonAnswer({"prompt": text}, headers=ignored.headers)

    return routes


def _checked(served: ServedModel, config: GatewayConfig, model: str | None) -> IgnoredFields:
    if model is not None:
        served.check(model)
    return IgnoredFields(config.strict_requests)


def _prepared(engine: TextEngine, body: TokenizeRequest, ignored: IgnoredFields) -> Submitted:
    if (body.messages is None) == (body.prompt is None):
        raise InputError("send a prompt, or messages", "prompt")
    if body.prompt is not None:
        for name in sorted(body.model_fields_set - OF_PROMPTS):
            ignored(name)
        text = RawText(checked_text(body.prompt, "prompt"), body.add_special_tokens is not False)
        return engine.prepare(text)
    if body.add_special_tokens:
        raise InputError(
            "the chat template writes the special tokens of messages: leave add_special_tokens out",
            "add_special_tokens",
        )
    conversation, pixels = chat_prompt(body, body.tool_use(ignored), ignored)
    return engine.prepare(conversation, **pixels)
