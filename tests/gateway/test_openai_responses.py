"""/v1/responses, with the official client and with plain HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import httpx
import openai
import pytest
from pydantic import BaseModel
from testing.fakes import FakeEngine, piece

from mdi.core.config import GatewayConfig
from mdi.core.errors import LinkError, OverloadedError
from mdi.core.messages import ImagePart, Message, TextPart
from mdi.gateway.openai.ignored import HEADER
from mdi.gateway.openai.response_store import ResponseStore
from tests.gateway.conftest import FakeServer, RealServer, serving

WEATHER: dict[str, Any] = {
    "type": "function",
    "name": "weather",
    "description": "Weather of a place.",
    "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    "strict": True,
}
ASKED: dict[str, Any] = {"model": "fake", "input": "hi"}


def test_a_response_is_whole_and_can_be_read_again(open_server: FakeServer, client: openai.OpenAI) -> None:
    response = client.responses.create(**ASKED, instructions="Be brief.", metadata={"run": "7"}, max_output_tokens=9)
    assert (response.output_text, response.status, response.metadata) == ("ok #0", "completed", {"run": "7"})
    assert response.usage
    assert (response.usage.input_tokens, response.usage.output_tokens, response.usage.total_tokens) == (7, 2, 9)
    call = open_server.engine.calls[-1]
    assert call.prompt == (Message("system", "Be brief."), Message("user", "hi"))
    assert call.params.max_tokens == 9
    assert client.responses.retrieve(response.id) == response
    client.responses.delete(response.id)
    for again in (client.responses.retrieve, client.responses.delete):
        with pytest.raises(openai.NotFoundError):
            again(response.id)


def test_a_conversation_goes_on_from_its_last_response(open_server: FakeServer, client: openai.OpenAI) -> None:
    first = client.responses.create(**ASKED, instructions="Be brief.")
    second = client.responses.create(model="fake", input="more", previous_response_id=first.id)
    client.responses.create(model="fake", input="even more", previous_response_id=second.id)
    answer = Message("assistant", (TextPart("ok #0"),))
    assert open_server.engine.calls[-1].prompt == (
        Message("user", "hi"),
        answer,
        Message("user", "more"),
        answer,
        Message("user", "even more"),
    )


def test_what_is_not_kept_cannot_be_continued(open_server: FakeServer, client: openai.OpenAI) -> None:
    response = client.responses.create(**ASKED, store=False)
    with pytest.raises(openai.BadRequestError, match="is not kept here") as caught:
        client.responses.create(**ASKED, previous_response_id=response.id)
    assert caught.value.param == "previous_response_id"


def test_nobody_reads_the_responses_of_another_key() -> None:
    with serving(FakeEngine(), GatewayConfig(api_keys=("mine", "theirs"))) as server:
        mine, theirs = ({"Authorization": f"Bearer {key}"} for key in ("mine", "theirs"))
        name = server.post("/v1/responses", json=ASKED, headers=mine).json()["id"]
        follow = ASKED | {"previous_response_id": name}
        assert server.post("/v1/responses", json=follow, headers=theirs).status_code == 400
        assert server.post("/v1/responses", json=follow, headers=mine).status_code == 200
        for headers, status in ((theirs, 404), (mine, 200)):
            read = httpx.get(f"{server.url}/v1/responses/{name}", headers=headers, timeout=60, verify=False)
            assert read.status_code == status


def test_the_memory_of_responses_has_limits() -> None:
    store = ResponseStore(max_responses=2, max_bytes=10_000)
    for name in "abc":
        store.add("me", {"id": name, "output": []}, (), ("x",))
    assert [store.get("me", name) is not None for name in "abc"] == [False, True, True]
    store.add("me", {"id": "d", "output": []}, (), ("x" * 8000,))
    assert [store.get("me", name) is not None for name in "bcd"] == [False, True, True]
    store.add("me", {"id": "e", "output": []}, (), ("x" * 12_000,))
    assert [store.get("me", name) is not None for name in "cde"] == [False, False, False]


def test_the_stream_has_openais_events_in_order(open_server: FakeServer, client: openai.OpenAI) -> None:
    events = list(client.responses.create(**ASKED, stream=True))
    assert [event.type for event in events] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    first, last = (event.to_dict()["response"] for event in (events[0], events[-1]))
    assert (first["status"], first["output"]) == ("in_progress", [])
    assert client.responses.retrieve(last["id"]).to_dict() == last


def test_an_answer_that_is_cut_is_incomplete(open_server: FakeServer, client: openai.OpenAI) -> None:
    open_server.engine.says(piece("a", "length"))
    response = client.responses.create(**ASKED)
    assert (response.status, response.output[0].to_dict()["status"]) == ("incomplete", "incomplete")
    assert response.incomplete_details
    assert response.incomplete_details.reason == "max_output_tokens"
    assert list(client.responses.create(**ASKED, stream=True))[-1].type == "response.incomplete"


def test_an_error_in_the_middle_of_a_stream_fails_the_response(open_server: FakeServer, client: openai.OpenAI) -> None:
    open_server.engine.says(piece("a"), LinkError("node finisher was lost"))
    last = list(client.responses.create(**ASKED, stream=True))[-1]
    assert last.type == "response.failed"
    assert last.response.error
    assert last.response.error.message == "node finisher was lost"
    open_server.engine.says(LinkError("lost"))
    with pytest.raises(openai.InternalServerError, match="lost"):
        list(client.responses.create(**ASKED, stream=True))
    open_server.engine.refuse = lambda _: OverloadedError("full")
    with pytest.raises(openai.RateLimitError):
        client.responses.create(**ASKED)


def test_items_become_messages(server: FakeServer, picture: str) -> None:
    image = {"type": "input_image", "image_url": picture, "detail": "auto"}
    items = [
        {"type": "message", "role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "input_text", "text": "What is it?"}, image]},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "weather", "arguments": '{"place": "Rome"}'},
        {"type": "function_call", "call_id": "c2", "name": "weather", "arguments": "{}", "status": "completed"},
        {"type": "function_call_output", "call_id": "c1", "output": "sunny"},
        {"type": "function_call_output", "call_id": "c2", "output": [image]},
        {"type": "message", "id": "m", "role": "assistant", "content": [{"type": "output_text", "text": "A"}], "x": 1},
    ]
    answer = server.post("/v1/responses", json={"model": "fake", "input": items})
    assert answer.headers[HEADER] == "input[].x"
    messages: Any = server.engine.calls[-1].prompt
    system, user, calls, first, second, assistant = messages
    assert (system.role, user.content) == ("system", (TextPart("What is it?"), ImagePart(picture)))
    assert [call["id"] for call in calls.details["tool_calls"]] == ["c1", "c2"]
    assert calls.details["tool_calls"][0]["function"] == {"name": "weather", "arguments": {"place": "Rome"}}
    assert (first.role, first.content, first.details["tool_call_id"]) == ("tool", "sunny", "c1")
    assert second.content == (ImagePart(picture),)
    assert assistant.content == (TextPart("A"),)


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"input": 5}, "input"),
        ({"input": []}, "input"),
        ({"input": ["x"]}, "input[0]"),
        ({"input": [{"role": "x", "content": "y"}]}, "input[0].role"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input[0].content[0]"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "x"}]}]},
            "input[0].content[0].file_id",
        ),
        ({"input": [{"role": "user", "content": 5}]}, "input[0].content"),
        ({"input": [{"type": "function_call_output", "call_id": 5, "output": ""}]}, "input[0].call_id"),
        ({"input": [{"type": "function_call_output", "call_id": "c"}]}, "input[0].output"),
        ({"instructions": 5}, "instructions"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"top_k": -5}, "top_k"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"metadata": {str(number): "" for number in range(17)}}, "metadata"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": ["x"]}, "tools[0]"),
        ({"tools": [WEATHER], "tool_choice": {"type": "file_search"}}, "tool_choice.type"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"truncation": "never"}, "truncation"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"stream": "yes"}, "stream"),
    ],
)
def test_malformed_requests_are_named(server: FakeServer, asked: Any, field: str) -> None:
    answer = server.post("/v1/responses", json=ASKED | asked)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field


class Place(BaseModel):
    name: Literal["Rome", "Oslo"]
    big: bool


@pytest.fixture
def official(real: RealServer) -> Iterator[openai.OpenAI]:
    """The official client of a tiny model."""
    with real.client as client:
        yield client


def test_the_openai_client_parses_an_answer_that_follows_a_schema(official: openai.OpenAI) -> None:
    answer = official.responses.parse(model="tiny", input="x", text_format=Place, max_output_tokens=200)
    assert answer.status == "completed"
    assert isinstance(answer.output_parsed, Place)
    with official.responses.stream(model="tiny", input="x", text_format=Place, max_output_tokens=200) as stream:
        stream.until_done()
        assert isinstance(stream.get_final_response().output_parsed, Place)


def test_an_image_is_read(real: RealServer, official: openai.OpenAI, picture: str) -> None:
    content: Any = [
        {"type": "input_image", "image_url": picture, "detail": "auto"},
        {"type": "input_text", "text": "x"},
    ]
    asked: Any = {"model": "tiny", "max_output_tokens": 2, "temperature": 0}
    plain = official.responses.create(input="x", **asked)
    seen = official.responses.create(input=[{"role": "user", "content": content}], **asked)
    assert seen.usage
    assert plain.usage
    assert seen.usage.input_tokens > plain.usage.input_tokens + 40
    broken = [{"role": "user", "content": [{"type": "input_image", "image_url": "data:image/png;base64,AAAA"}]}]
    assert real.post("/v1/responses", json={"model": "tiny", "input": broken, "stream": True}).status_code == 400


def test_logprobs_come_on_request(official: openai.OpenAI) -> None:
    include: Any = ["message.output_text.logprobs"]
    asked: Any = {"model": "tiny", "input": "x", "max_output_tokens": 3, "include": include, "top_logprobs": 2}
    answer: Any = official.responses.create(**asked).to_dict()
    logprobs = answer["output"][0]["content"][0]["logprobs"]
    assert len(logprobs) == 3
    assert len(logprobs[0]["top_logprobs"]) == 2
    deltas = [
        event for event in official.responses.create(**asked, stream=True) if event.type == "response.output_text.delta"
    ]
    assert sum(len(event.logprobs) for event in deltas) == 3


CALL = '<tool_call>\n{"name": "weather", "arguments": {"place": "Rome"}}\n</tool_call>'


def test_the_model_calls_a_tool(open_server: FakeServer, client: openai.OpenAI) -> None:
    open_server.engine.says(piece("Let me see."), piece(CALL, "stop"))
    tools: Any = [WEATHER]
    response = client.responses.create(**ASKED, tools=tools, tool_choice="auto", parallel_tool_calls=False)
    output: list[Any] = response.output
    message, call = output
    assert (message.type, call.type) == ("message", "function_call")
    assert (call.name, call.arguments) == ("weather", '{"place": "Rome"}')
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    client.responses.create(model="fake", input=[result], previous_response_id=response.id)
    messages: Any = open_server.engine.calls[-1].prompt
    _, assistant, tool = messages
    assert assistant.details["tool_calls"][0]["id"] == tool.details["tool_call_id"] == call.call_id


def test_calls_are_streamed_with_their_arguments(open_server: FakeServer, client: openai.OpenAI) -> None:
    open_server.engine.says(piece(CALL[:40]), piece(CALL[40:], "stop"))
    tools: Any = [WEATHER]
    events: list[Any] = list(client.responses.create(**ASKED, tools=tools, stream=True))
    assert [event.type for event in events if not event.type.endswith(".delta")] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert "".join(deltas) == '{"place": "Rome"}'


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [WEATHER | {"parameters": 5}]}, "tools[0].parameters"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice.name"),
    ],
)
def test_malformed_tools_are_named(server: FakeServer, asked: Any, field: str) -> None:
    answer = server.post("/v1/responses", json=ASKED | asked)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field
