"""pydantic-ai: agents with output types, tools and pictures, over chats and responses."""

from __future__ import annotations

import asyncio
import base64
from typing import Any, Literal

import pytest
from pydantic import BaseModel
from pydantic_ai import Agent, BinaryContent, ModelHTTPError, NativeOutput, ToolOutput, UsageLimitExceeded, UsageLimits
from pydantic_ai.models import Model
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider


class Seen(BaseModel):
    shape: Literal["circle", "star"]


@pytest.fixture(params=["chat", "responses"])
def model(request: pytest.FixtureRequest, base_url: str, key: str) -> Model[Any]:
    provider = OpenAIProvider(base_url=base_url, api_key=key)
    kind = OpenAIChatModel if request.param == "chat" else OpenAIResponsesModel
    return kind("bundled", provider=provider)


@pytest.fixture
def question(star: str) -> list[Any]:
    picture = BinaryContent(base64.b64decode(star), media_type="image/png")
    return [picture, "Tell me the shape of the purple shape."]


def test_an_agent_sees_a_picture_whole_and_streamed(model: Model[Any], question: list[Any]) -> None:
    agent = Agent(model, instructions="Answer briefly.")

    async def ask() -> tuple[str, str]:
        whole = await agent.run(question)
        async with agent.run_stream(question) as stream:
            return whole.output, await stream.get_output()

    whole, streamed = asyncio.run(ask())
    assert whole
    assert streamed


def test_output_is_a_call_of_a_tool(model: Model[Any], question: list[Any]) -> None:
    answer = Agent(model, output_type=ToolOutput(Seen), retries=0).run_sync(question)
    assert isinstance(answer.output, Seen)
    assert answer.usage.output_tokens > 0


def test_output_follows_a_schema(base_url: str, key: str, question: list[Any]) -> None:
    provider = OpenAIProvider(base_url=base_url, api_key=key)
    for kind in (OpenAIChatModel, OpenAIResponsesModel):
        agent = Agent(kind("bundled", provider=provider), output_type=NativeOutput(Seen), retries=0)
        assert isinstance(agent.run_sync(question).output, Seen)


def test_results_of_tools_go_back(model: Model[Any]) -> None:
    """The model must call one of two tools: the one that looks until the limit, or the one that ends the run."""
    agent = Agent(model, output_type=ToolOutput(Seen), retries=5)
    looked: list[str] = []

    @agent.tool_plain
    def look(where: Literal["left", "right"]) -> str:
        """Looks at one side of the picture."""
        looked.append(where)
        return f"a star on the {where}"

    try:
        answer = agent.run_sync("Which shape is it?", usage_limits=UsageLimits(request_limit=3))
    except UsageLimitExceeded:
        assert len(looked) >= 2
    else:
        assert isinstance(answer.output, Seen)


def test_errors_are_its_own(base_url: str) -> None:
    agent = Agent(OpenAIChatModel("bundled", provider=OpenAIProvider(base_url=base_url, api_key="wrong")))
    with pytest.raises(ModelHTTPError) as unknown:
        agent.run_sync("Hello")
    assert unknown.value.status_code == 401
