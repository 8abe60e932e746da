"""The JSON of all answers, for the OpenAPI document."""

from __future__ import annotations

from typing import Literal

from typing_extensions import TypedDict  # pydantic needs it before Python 3.12

from mdi.core.outputs import FinishReason
from mdi.core.status import CacheStatus, NodeStatus, PlanStatus


class ErrorDetails(TypedDict):
    """OpenAI's description of an error. param: the field of the request that is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIError(TypedDict):
    """An error of the routes under /v1."""

    error: ErrorDetails


class PlainError(TypedDict):
    """An error of the other routes. field: the field of the request that is wrong."""

    detail: str
    field: str | None


class PromptTokensDetails(TypedDict):
    cached_tokens: int


class CompletionTokensDetails(TypedDict):
    reasoning_tokens: int


class _TokenUsage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TokenUsage(_TokenUsage, total=False):
    """Tokens of a request: of the prompt, media included, and of all its answers together.

    completion_tokens_details: of chats with models that think.
    """

    completion_tokens_details: CompletionTokensDetails


class TopLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    content: list[TokenLogprob]
    refusal: None


class TextLogprobs(TypedDict):
    """Columns, one entry for each token. text_offset: the character of the text that its first byte belongs to.

    The first token of an echoed prompt has no logprob.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CalledFunction(TypedDict):
    """arguments: JSON text; of a call that was cut off (finish_reason is length), its beginning."""

    name: str
    arguments: str


class ToolCall(TypedDict):
    id: str
    type: Literal["function"]
    function: CalledFunction


class _AnswerMessage(TypedDict):
    role: Literal["assistant"]
    content: str | None


class AnswerMessage(_AnswerMessage, total=False):
    """reasoning: the model's thoughts, under both names that vLLM has had. function_call: answers `functions`."""

    reasoning_content: str
    reasoning: str
    tool_calls: list[ToolCall]
    function_call: CalledFunction


ChatEnd = FinishReason | Literal["tool_calls", "function_call"]


class _ChatChoice(TypedDict):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatEnd


class ChatChoice(_ChatChoice, total=False):
    """stop_reason: the stop string or token that ended the answer. token_ids: with return_token_ids."""

    stop_reason: str | int
    token_ids: list[int]


class FunctionDelta(TypedDict, total=False):
    name: str
    arguments: str


class _ToolCallDelta(TypedDict):
    index: int
    function: FunctionDelta


class ToolCallDelta(_ToolCallDelta, total=False):
    """The first one of a call has its id, type and name."""

    id: str
    type: Literal["function"]


class Delta(TypedDict, total=False):
    role: Literal["assistant"]
    content: str
    reasoning_content: str
    reasoning: str
    tool_calls: list[ToolCallDelta]
    function_call: FunctionDelta


class _ChatChunkChoice(TypedDict):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: ChatEnd | None


class ChatChunkChoice(_ChatChunkChoice, total=False):
    """stop_reason: the stop string or token that ended the answer. token_ids: with return_token_ids."""

    stop_reason: str | int
    token_ids: list[int]


class _TextChoice(TypedDict):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason


class TextChoice(_TextChoice, total=False):
    """stop_reason: the stop string or token that ended the answer.

    token_ids, prompt_token_ids: with return_token_ids; the prompt's stand in its first chunk.
    """

    stop_reason: str | int
    token_ids: list[int]
    prompt_token_ids: list[int]


class _TextChunkChoice(TypedDict):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason | None


class TextChunkChoice(_TextChunkChoice, total=False):
    """stop_reason: the stop string or token that ended the answer.

    token_ids, prompt_token_ids: with return_token_ids; the prompt's stand in its first chunk.
    """

    stop_reason: str | int
    token_ids: list[int]
    prompt_token_ids: list[int]


class _ChatCompletion(TypedDict):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: TokenUsage


class ChatCompletion(_ChatCompletion, total=False):
    """prompt_token_ids: with return_token_ids."""

    prompt_token_ids: list[int]


class _ChatChunk(TypedDict):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]


class ChatCompletionChunk(_ChatChunk, total=False):
    """usage: with stream_options. prompt_token_ids: in the first chunk, with return_token_ids."""

    usage: TokenUsage
    prompt_token_ids: list[int]


class TextCompletion(TypedDict):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: TokenUsage


class _TextChunk(TypedDict):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChunkChoice]


class TextCompletionChunk(_TextChunk, total=False):
    usage: TokenUsage


class Model(TypedDict):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    max_model_len: int
    modalities: list[Literal["text", "image", "video"]]
    capabilities: list[Literal["completion", "tools", "vision", "thinking"]]


class ModelList(TypedDict):
    object: Literal["list"]
    data: list[Model]


class _Tokens(TypedDict):
    count: int
    max_model_len: int
    tokens: list[int]


class Tokens(_Tokens, total=False):
    """Token ids of a prompt. token_strs: with return_token_strs."""

    token_strs: list[str]


class Text(TypedDict):
    prompt: str


class Version(TypedDict):
    version: str


class ServerLoad(TypedDict):
    """Requests: all of them, those that are being computed, and those that wait."""

    server_load: int
    running: int
    waiting: int


class Samples(TypedDict):
    samples: list[str]


class SampleEvent(TypedDict):
    index: int
    text: str
    finish_reason: FinishReason | None


class Health(TypedDict):
    status: Literal["ok", "recovering"]
    model: str


class Ready(TypedDict):
    status: Literal["ready"]


class Unready(TypedDict, total=False):
    """detail: why the server must be restarted."""

    status: Literal["recovering", "busy", "unavailable"]
    detail: str


class Requests(TypedDict):
    """Requests that run and wait, and the tokens of all since the server started."""

    running: int
    waiting: int
    prompt_tokens: int
    generated_tokens: int


class Nodes(TypedDict):
    """See `NodeStatus` and `PlanStatus`. recovering: nodes are being brought back now. recoveries: how often it began.

    Fields may be added, and none goes or changes its meaning before the next version of the API.
    """

    model: str
    version: str
    nodes: list[NodeStatus]
    plan: PlanStatus
    requests: Requests
    cache: CacheStatus
    recovering: bool
    recoveries: int
    failed_requests: int
