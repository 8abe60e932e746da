"""What an agent does with a server, over the OpenAI API: an answer in JSON of a schema, and a call of a tool.

The requests go through the whole gateway, in this process: no port is opened.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from mdi.checkpoint.bundled import BUNDLED
from mdi.cli.sample_questions import CalledSample, StructuredSample, agent_samples
from mdi.gateway.app import create_app

if TYPE_CHECKING:
    from mdi.engine import Engine

MAX_TOKENS, TIMEOUT_S = 96, 120


@dataclass(frozen=True)
class AgentStep:
    """One thing that was said. right: None for what the model did not choose."""

    speaker: str
    text: str
    right: bool | None = None


def agent_steps(engine: Engine) -> list[AgentStep]:
    """Asks for both samples, and answers the call with its result."""
    return asyncio.run(_steps(engine))


async def _steps(engine: Engine) -> list[AgentStep]:
    structured, called = agent_samples()
    transport = httpx.ASGITransport(create_app(engine))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=TIMEOUT_S) as client:
        return [*await _answer_in_json(client, structured), *await _call_a_tool(client, called)]


async def _answer_in_json(client: httpx.AsyncClient, sample: StructuredSample) -> list[AgentStep]:
    keys = ", ".join(sample.schema["properties"])
    format_ = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": sample.schema}}
    message = await _complete(client, [_asked(sample.question, sample.media)], response_format=format_)
    right = json.loads(message["content"]) == sample.truth
    return [
        AgentStep("user", f"{sample.question} (a schema with {keys})"),
        AgentStep("model", message["content"], right),
    ]


async def _call_a_tool(client: httpx.AsyncClient, sample: CalledSample) -> list[AgentStep]:
    names = ", ".join(tool["function"]["name"] for tool in sample.tools)
    messages = [_asked(sample.question, sample.media)]
    steps = [AgentStep("user", f"{sample.question} (tools: {names})")]
    message = await _complete(client, messages, tools=sample.tools)
    calls = message.get("tool_calls") or []
    if not calls:
        return [*steps, AgentStep("model", message["content"], False)]
    for call in calls:
        function = call["function"]
        made = {"name": function["name"], "arguments": json.loads(function["arguments"])}
        steps.append(AgentStep("model calls", f"{function['name']}({function['arguments']})", made == sample.call))
        steps.append(AgentStep("tool", sample.result))
    results = [{"role": "tool", "tool_call_id": call["id"], "content": sample.result} for call in calls]
    answer = await _complete(client, [*messages, message, *results], tools=sample.tools)
    return [*steps, AgentStep("model", answer["content"] or "", answer["content"] == sample.truth)]


async def _complete(client: httpx.AsyncClient, messages: list[dict[str, Any]], **settings: Any) -> dict[str, Any]:
    """The model's message."""
    body = {"model": BUNDLED, "messages": messages, "temperature": 0, "max_tokens": MAX_TOKENS, **settings}
    answer = (await client.post("/v1/chat/completions", json=body)).raise_for_status().json()
    message: dict[str, Any] = answer["choices"][0]["message"]
    return message


def _asked(question: str, media: Sequence[Path]) -> dict[str, Any]:
    urls = ["data:image/png;base64," + base64.b64encode(path.read_bytes()).decode() for path in media]
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [*parts, {"type": "text", "text": question}]}
