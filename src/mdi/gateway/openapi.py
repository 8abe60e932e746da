"""The OpenAPI document: FastAPI's, with what it cannot know of answers, errors and forms."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from pydantic import TypeAdapter

from mdi.gateway import answer_types as types
from mdi.gateway.anthropic import answer_types as anthropic_types
from mdi.gateway.anthropic.schemas import CountRequest, MessagesRequest
from mdi.gateway.errors import is_anthropics, is_openais
from mdi.gateway.generate import MultimodalRequest, TextRequest
from mdi.gateway.middleware.api_keys import OPEN_PATHS
from mdi.gateway.openai import response_types
from mdi.gateway.openai.completion_schema import CompletionRequest
from mdi.gateway.openai.ignored import HEADER
from mdi.gateway.openai.response_schema import ResponsesRequest
from mdi.gateway.openai.schemas import ChatRequest
from mdi.gateway.tokenize import DetokenizeRequest, TokenizeRequest
from mdi.gateway.uploads import UPLOAD_FIELDS

JSON, FORM, EVENTS = "application/json", "multipart/form-data", "text/event-stream"
REF = "#/components/schemas/{model}"


@dataclass(frozen=True)
class RouteAnswers:
    """What a route answers: the JSON, that of the events of its stream, and other answers by their status.

    asked: the JSON that it reads. named: events have the name of their type, and none marks the end.
    """

    whole: Any
    event: Any = None
    asked: Any = None
    others: Mapping[int, Any] | None = None
    named: bool = False


ANSWERS = {
    "/generate": RouteAnswers(types.Samples, types.SampleEvent, TextRequest),
    "/generate/multimodal": RouteAnswers(types.Samples, types.SampleEvent, MultimodalRequest),
    "/v1/chat/completions": RouteAnswers(types.ChatCompletion, types.ChatCompletionChunk, ChatRequest),
    "/v1/completions": RouteAnswers(types.TextCompletion, types.TextCompletionChunk, CompletionRequest),
    "/v1/responses": RouteAnswers(
        response_types.ResponseObject, response_types.ResponseEvent, ResponsesRequest, named=True
    ),
    "/v1/responses/{name}": RouteAnswers(response_types.ResponseObject),
    "DELETE /v1/responses/{name}": RouteAnswers(response_types.DeletedResponse),
    "/v1/messages": RouteAnswers(
        anthropic_types.MessageObject, anthropic_types.MessageEvent, MessagesRequest, named=True
    ),
    "/v1/messages/count_tokens": RouteAnswers(anthropic_types.TokenCount, asked=CountRequest),
    "/v1/models": RouteAnswers(types.ModelList),
    "/v1/models/{name}": RouteAnswers(types.Model),
    "/tokenize": RouteAnswers(types.Tokens, asked=TokenizeRequest),
    "/detokenize": RouteAnswers(types.Text, asked=DetokenizeRequest),
    "/version": RouteAnswers(types.Version),
    "/load": RouteAnswers(types.ServerLoad),
    "/ping": RouteAnswers(types.Health, others={503: types.Unready}),
    "/v1/nodes": RouteAnswers(types.Nodes),
    "/health": RouteAnswers(types.Health, others={503: types.Unready}),
    "/health/ready": RouteAnswers(types.Ready, others={503: types.Unready}),
}

NAMING_THE_MODEL = (
    *(ChatRequest, CompletionRequest, ResponsesRequest, MessagesRequest, CountRequest),
    *(TokenizeRequest, DetokenizeRequest),
)
"""The requests with the model's name."""

CAUSES = {
    400: "The request is wrong: the message names the field and the remedy.",
    401: "The API key is missing or wrong.",
    403: "The request comes from a page of another site, or to a name that the server does not know.",
    404: "The model is not served here.",
    413: "The body is too large.",
    415: "The body is not of a type that this route reads.",
    429: "The queue is full: try again after Retry-After seconds.",
    500: "An error of the server: its log has the details.",
    503: "A node was lost and did not come back in time, or the server is shutting down.",
    504: "The answer took too long.",
}
OF_EVERY_ROUTE = (401, 403, 500)
OF_QUESTIONS = (400, 413, 415, 429, 503, 504)


def complete(app: FastAPI, names: Sequence[str], *, needs_key: bool) -> None:
    """Makes the app's document say all that its routes answer.

    names: of the model. needs_key: requests must bring the API key.
    """
    made = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            _complete(made(), names, needs_key)
        return made()

    app.openapi = openapi  # type: ignore[method-assign]


KEYS = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}
"""How a request may carry its key: as OpenAI's clients send it, or as Anthropic's do."""


def _complete(document: dict[str, Any], names: Sequence[str], needs_key: bool) -> None:
    components = document.setdefault("components", {}).setdefault("schemas", {})
    schemas = _Schemas(components)
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            operation["responses"] = _responses(path, method, schemas)
            if asked := _answers(path, method).asked:  # FastAPI's schema has rounded numbers
                operation["requestBody"] = {"required": True, "content": {JSON: {"schema": schemas.of(asked)}}}
            if needs_key and path not in OPEN_PATHS:
                operation["security"] = [{name: []} for name in KEYS]  # any one of them
    for kind in NAMING_THE_MODEL:
        model = components[kind.__name__]["properties"]["model"]
        model.get("anyOf", [model])[0]["enum"] = list(names)
    multimodal = document["paths"]["/generate/multimodal"]["post"]
    multimodal["requestBody"]["content"][FORM] = {"schema": _form()}
    _drop_unused(document, components)
    if needs_key:
        document["components"]["securitySchemes"] = KEYS


def _drop_unused(document: dict[str, Any], components: dict[str, Any]) -> None:
    """Removes schemas that nothing names, such as those of FastAPI's own errors."""
    unused = [name for name in components if f'"{REF.format(model=name)}"' not in json.dumps(document)]
    for name in unused:
        del components[name]
    if unused:
        _drop_unused(document, components)


class _Schemas:
    """The schemas of types, in the document's components."""

    def __init__(self, components: dict[str, Any]) -> None:
        self._components = components

    def of(self, kind: Any) -> dict[str, Any]:
        schema = TypeAdapter(kind).json_schema(ref_template=REF)
        self._components.update(schema.pop("$defs", {}))
        name = kind.__name__
        self._components[name] = schema
        return {"$ref": REF.format(model=name)}


def _answers(path: str, method: str) -> RouteAnswers:
    return ANSWERS.get(f"{method.upper()} {path}") or ANSWERS[path]


def _responses(path: str, method: str, schemas: _Schemas) -> dict[str, Any]:
    answers, named_model = _answers(path, method), is_openais(path) or is_anthropics(path)
    asks = method == "post" and answers.asked is not None
    content: dict[str, Any] = {JSON: {"schema": schemas.of(answers.whole)}}
    error = schemas.of(_error_kind(path))
    if answers.event:
        content[EVENTS] = {"itemSchema": _event(schemas.of(answers.event), error, named=answers.named)}
    responses: dict[str, Any] = {"200": {"description": "The answer.", "content": content}}
    if named_model and asks:
        text = {"type": "string"}
        names = {"description": "Names of the request's unknown fields, which were ignored.", "schema": text}
        responses["200"]["headers"] = {HEADER: names}
    statuses = {
        *OF_EVERY_ROUTE,
        *(OF_QUESTIONS if asks else ()),
        *((404,) if "{" in path or (named_model and asks) else ()),
    }
    if path in OPEN_PATHS:
        statuses.discard(401)
    for status in sorted(statuses):
        responses[str(status)] = {"description": CAUSES[status], "content": {JSON: {"schema": error}}}
    for status, kind in (answers.others or {}).items():
        responses[str(status)] = {"description": "Not now.", "content": {JSON: {"schema": schemas.of(kind)}}}
    return responses


def _error_kind(path: str) -> Any:
    if is_anthropics(path):
        return anthropic_types.AnthropicError
    return types.OpenAIError if is_openais(path) else types.PlainError


def _event(chunk: dict[str, Any], error: dict[str, Any], *, named: bool) -> dict[str, Any]:
    part = _as_text({"anyOf": [chunk, error]})
    if named:
        return {"type": "object", "properties": {"event": {"type": "string"}, "data": part}, "required": ["data"]}
    done = {"const": "[DONE]", "description": "The last event, unless an error ends the stream."}
    return {"type": "object", "properties": {"data": {"anyOf": [done, part]}}, "required": ["data"]}


def _as_text(schema: dict[str, Any]) -> dict[str, Any]:
    """A text that is JSON of this schema."""
    return {"type": "string", "contentMediaType": JSON, "contentSchema": schema}


def _form() -> dict[str, Any]:
    """A form: every field is the text of its JSON, or of itself, and files are images and videos."""
    fields = TypeAdapter(MultimodalRequest).json_schema(ref_template=REF)["properties"]
    texts = {name: _as_text(schema) for name, schema in fields.items()} | {"stop": {"type": "string"}}
    prompt = {"type": "string", "description": "The text of one user message, in place of messages."}
    files = {"type": "array", "items": {"type": "string", "format": "binary"}}
    either = [{"required": ["prompt"]}, {"required": ["messages"]}]
    properties = {"prompt": prompt, **texts, **dict.fromkeys(UPLOAD_FIELDS, files)}
    return {"type": "object", "properties": properties, "additionalProperties": False, "oneOf": either}
