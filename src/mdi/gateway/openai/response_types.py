"""The JSON of responses and of their events, for the OpenAPI document."""

from __future__ import annotations

from typing import Any, Literal

from typing_extensions import TypedDict

ItemStatus = Literal["in_progress", "completed", "incomplete"]
Object = dict[str, Any]


class OutputText(TypedDict):
    type: Literal["output_text"]
    text: str
    annotations: list[Object]
    logprobs: list[Object]


class OutputMessage(TypedDict):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: ItemStatus
    content: list[OutputText]


class ReasoningText(TypedDict):
    type: Literal["reasoning_text"]
    text: str


class OutputReasoning(TypedDict):
    id: str
    type: Literal["reasoning"]
    status: ItemStatus
    summary: list[Object]
    content: list[ReasoningText]


class OutputCall(TypedDict):
    id: str
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    status: ItemStatus


class InputTokensDetails(TypedDict):
    cached_tokens: int


class OutputTokensDetails(TypedDict):
    reasoning_tokens: int


class ResponseUsage(TypedDict):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseError(TypedDict):
    code: Literal["server_error", "invalid_prompt"]
    message: str


class IncompleteDetails(TypedDict):
    reason: Literal["max_output_tokens"]


class ResponseObject(TypedDict):
    """A response. Fields of the request stand in it as they were sent."""

    id: str
    object: Literal["response"]
    created_at: int
    model: str
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    output: list[OutputMessage | OutputReasoning | OutputCall]
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: Object
    store: bool
    temperature: float | None
    text: Object
    tool_choice: str | Object | None
    tools: list[Object]
    top_logprobs: int
    top_p: float | None
    truncation: Literal["disabled"]
    usage: ResponseUsage | None


class _Event(TypedDict):
    type: str
    sequence_number: int


class ResponseEvent(_Event, total=False):
    """An event: its type says which of the other fields it has, as in OpenAI's."""

    response: ResponseObject
    output_index: int
    content_index: int
    item_id: str
    item: OutputMessage | OutputReasoning | OutputCall
    part: OutputText | ReasoningText
    delta: str
    text: str
    logprobs: list[Object]
    name: str
    arguments: str


class DeletedResponse(TypedDict):
    id: str
    object: Literal["response"]
    deleted: Literal[True]
