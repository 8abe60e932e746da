"""POST /v1/chat/completions, with images and videos."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from mdi.core.config import GatewayConfig
from mdi.core.messages import Conversation, parse_messages
from mdi.core.outputs import Piece, Sample
from mdi.core.unknown_fields import UnknownField
from mdi.gateway.answer_parts import (
    Answer,
    AnswerReader,
    ArgumentsDelta,
    CallStart,
    EndReason,
    Finish,
    Part,
    ReasoningDelta,
    TextDelta,
)
from mdi.gateway.engine import Submitted, TextEngine
from mdi.gateway.json_body import JSONRoute
from mdi.gateway.media_settings import MediaSettings, Pixels
from mdi.gateway.openai.answer import answer, stop_reason
from mdi.gateway.openai.ignored import IgnoredFields
from mdi.gateway.openai.logprobs import ChatLogprobsOf, chat_logprobs, no_logprobs
from mdi.gateway.openai.models import ServedModel
from mdi.gateway.openai.schemas import ChatRequest
from mdi.gateway.tool_use import ToolUse


def router(engine: TextEngine, served: ServedModel, config: GatewayConfig) -> APIRouter:
    routes = APIRouter(route_class=JSONRoute)

    @routes.post("/chat/completions")
    async def chat(request: Request, body: ChatRequest) -> Response:
        served.check(body.model)
        ignored = IgnoredFields(config.strict_requests)
        body.check_fields(ignored)
        running, reader = submit_chat(engine, body, ignored)
        choices = ChatChoices(
            running,
            reader,
            chat_logprobs(engine, body.skip_special_tokens) if body.logprobs else no_logprobs,
            _Shown(ids=body.return_token_ids, reasoning=body.include_reasoning, functions=bool(body.functions)),
        )
        response = await answer(request, body, running, choices, served.name, config.request_timeout_s)
        response.headers.update(ignored.headers)
        return response

    return routes


def submit_chat(engine: TextEngine, body: ChatRequest, unknown: UnknownField) -> tuple[Submitted, AnswerReader]:
    """Starts the request of a chat. Every route that answers chats asks in this form."""
    tool_use = body.tool_use(unknown)
    conversation, pixels = chat_prompt(body, tool_use, unknown)
    conversation = replace(conversation, marks=tool_use.marks(engine.capabilities))
    constraint = tool_use.constraint(engine.capabilities, body.constraint)
    running = engine.submit(conversation, body.params(), constraint=constraint, **pixels)
    return running, tool_use.reader(engine.capabilities, running)


def chat_prompt(body: ChatRequest, tool_use: ToolUse, unknown: UnknownField) -> tuple[Conversation, Pixels]:
    """What a chat asks: its conversation, and its limits on the area of images and frames."""
    media = body.mm_processor_kwargs or MediaSettings()
    media.check_fields(unknown)
    messages = media.applied_to(parse_messages(body.messages, unknown))
    conversation = Conversation(
        messages,
        body.template_settings,
        body.add_generation_prompt,
        body.continue_final_message,
        tool_use.offered,
    )
    return conversation, media.pixels(body.min_pixels, body.max_pixels)


@dataclass(frozen=True, slots=True)
class _Shown:
    """What an answer shows. ids: token ids, as vLLM does, those of the prompt beside the choices. reasoning: thoughts.

    functions: calls in OpenAI's older form, of which an answer has one.
    """

    ids: bool = False
    reasoning: bool = True
    functions: bool = False


class ChatChoices:
    """Choices of one chat. In a stream, the first chunk of a sample has the role, the last one the finish reason."""

    id_prefix = "chatcmpl"
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def __init__(
        self, running: Submitted, reader: AnswerReader, logprobs_of: ChatLogprobsOf, shown: _Shown = _Shown()
    ) -> None:
        self._running = running
        self._reader = reader
        self._logprobs_of = logprobs_of
        self._shown = shown
        self._started: set[int] = set()

    def shared(self) -> dict[str, Any]:
        return {"prompt_token_ids": self._running.prompt_token_ids} if self._shown.ids else {}

    def completion_details(self) -> dict[str, Any]:
        tokens = self._reader.reasoning_tokens
        return {} if tokens is None else {"completion_tokens_details": {"reasoning_tokens": tokens}}

    def whole(self, index: int, sample: Sample) -> dict[str, Any]:
        answer = self._reader.whole(index, sample)
        choice = {
            "index": index,
            "message": self._message(answer),
            "logprobs": self._logprobs_of(answer.tokens),
            "finish_reason": self._reason(answer.reason),
        }
        return choice | stop_reason(sample) | self._ids(answer)

    def chunks(self, piece: Piece) -> Iterator[dict[str, Any]]:
        if piece.index not in self._started:
            self._started.add(piece.index)
            yield _chunk(piece.index, {"role": "assistant", "content": ""})
        for part in self._reader.parts(piece):
            logprobs = self._logprobs_of(part.tokens) if part.tokens else None
            reason = self._reason(part.reason) if isinstance(part, Finish) else None
            delta = self._delta(part)
            if delta or reason or logprobs or self._shown.ids:
                ended = stop_reason(part) if isinstance(part, Finish) else {}
                yield _chunk(part.index, delta, reason, logprobs) | ended | self._ids(part)

    def _ids(self, part: Part | Answer) -> dict[str, Any]:
        return {"token_ids": [token.id for token in part.tokens]} if self._shown.ids else {}

    def _reason(self, reason: EndReason) -> str:
        return "function_call" if self._shown.functions and reason == "tool_calls" else reason

    def _message(self, answer: Answer) -> dict[str, Any]:
        """A whole answer as OpenAI's message: fields that say nothing are left out, but content."""
        message: dict[str, Any] = {"role": "assistant", "content": answer.text or (None if answer.calls else "")}
        if answer.reasoning and self._shown.reasoning:
            message |= _reasoning(answer.reasoning)
        calls = [{"name": call.name, "arguments": call.arguments} for call in answer.calls]
        if calls and self._shown.functions:
            message["function_call"] = calls[0]
        elif calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": function}
                for call, function in zip(answer.calls, calls, strict=True)
            ]
        return message

    def _delta(self, part: Part) -> dict[str, Any]:
        """What a part adds to the message, as OpenAI's delta."""
        match part:
            case TextDelta():
                return {"content": part.text}
            case ReasoningDelta():
                return _reasoning(part.text) if self._shown.reasoning else {}
            case CallStart():
                function = {"name": part.name, "arguments": ""}
                if self._shown.functions:
                    return {"function_call": function}
                return {"tool_calls": [{"index": part.call, "id": part.id, "type": "function", "function": function}]}
            case ArgumentsDelta() if self._shown.functions:
                return {"function_call": {"arguments": part.text}}
            case ArgumentsDelta():
                return {"tool_calls": [{"index": part.call, "function": {"arguments": part.text}}]}
            case Finish():
                return {}


def _reasoning(text: str) -> dict[str, Any]:
    """Thoughts under both names that clients know: vLLM's former one, which DeepSeek has, and its newer one."""
    return {"reasoning_content": text, "reasoning": text}


def _chunk(
    index: int, delta: dict[str, Any], reason: str | None = None, logprobs: dict[str, Any] | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
