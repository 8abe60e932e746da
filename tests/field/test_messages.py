"""Messages that clients send: settings of media, calls of tools, empty contents, and what the chat template sees."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from testing.checkpoints import tiny_text_config
from transformers import AutoTokenizer

from mdi import Engine
from mdi.checkpoint.random_weights import write_random_checkpoint
from mdi.core.messages import ImagePart, Message, VideoPart, parse_messages
from mdi.prompt.tokenizer import Tokenizer
from tests.gateway.conftest import CHAT, FakeServer, serving, with_part


@pytest.mark.parametrize("place", ["inside", "beside", "both"])
def test_settings_of_media_count_inside_their_url_object_as_beside_it(lenient: FakeServer, place: str) -> None:
    """A13: fps, nframes and pixels inside image_url and video_url."""
    url = "https://example.org/a"
    pixels = {"min_pixels": 784, "max_pixels": 50_000.0}
    for kind, expected in (
        ("image", ImagePart(url, 784, 50_000)),
        ("video", VideoPart(url, fps=16, min_pixels=784, max_pixels=50_000, total_pixels=10**6)),
        ("video", VideoPart(url, nframes=4, min_pixels=784, max_pixels=50_000)),
    ):
        rate = {"fps": 16, "total_pixels": 10**6} if "fps=16" in str(expected) else {"nframes": 4}
        settings = pixels | (rate if kind == "video" else {})
        inside = {} if place == "beside" else settings
        beside = {} if place == "inside" else settings
        part = {"type": f"{kind}_url", f"{kind}_url": {"url": url, "detail": "low", **inside}, **beside}
        answer = lenient.post("/v1/chat/completions", json=with_part(part))
        assert (answer.status_code, answer.headers.get("x-mdi-ignored")) == (200, None)
        assert lenient.engine.part(0) == expected


@pytest.mark.parametrize(
    ("part", "field"),
    [
        ({"image_url": {"url": "a", "max_pixels": 9}, "max_pixels": 8}, "image_url.max_pixels"),
        ({"video_url": {"url": "a", "fps": "2"}}, "video_url.fps"),
        ({"video_url": {"url": "a", "fps": True}}, "video_url.fps"),
        ({"video_url": {"url": "a", "nframes": 2.5}}, "video_url.nframes"),
        ({"video_url": {"url": "a", "nframes": 10**40}}, "video_url.nframes"),
        ({"image_url": {"url": "a", "detail": "tiny"}}, "image_url.detail"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_settings_that_contradict_or_are_none_are_refused_by_name(lenient: FakeServer, part: Any, field: str) -> None:
    """A13."""
    answer = lenient.post("/v1/chat/completions", json=with_part({"type": next(iter(part)), **part}))
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == f"messages[0].content[0].{field}"


@pytest.mark.parametrize("kind", ["input_audio", "file", "audio_url", "input_text"])
def test_parts_that_no_model_here_reads_are_refused_by_their_type(lenient: FakeServer, kind: str) -> None:
    """A13: brothers of image_url."""
    answer = lenient.post("/v1/chat/completions", json=with_part({"type": kind, kind: {"data": "", "format": "wav"}}))
    assert answer.status_code == 400
    assert kind in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"] == "messages[0].content[0]"


TOOLS = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}{% if message.name %} {{ message.name }}{% endif %}
{%- if message.role == 'function' -%}{{ raise_exception('function is not a role: use tool') }}{%- endif -%}
{%- if enable_thinking %}{% set thought = message.reasoning_content %}
{%- if thought %}<think>{{ thought }}</think>{% endif %}{% endif -%}
{{ message.content }}
{%- for call in message.tool_calls or [] -%}
[{{ call.function.name }} {{ call.function.arguments | tojson }} {{ call.id }}]
{%- endfor -%}
{{- message.tool_call_id or '' }}<|im_end|>
{%- endfor -%}
<|im_start|>assistant{{ effort }}
"""
"""A chat template that reads what Qwen's templates read of tools and reasoning."""


@pytest.fixture(scope="module")
def with_tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_random_checkpoint(tmp_path_factory.mktemp("tools") / "tools", tiny_text_config())
    settings = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TOOLS}))
    return path


def nested(depth: int) -> Any:
    return [nested(depth - 1)] if depth else 0


def tool_messages(arguments: Any) -> list[dict[str, Any]]:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    return [
        {"role": "user", "content": "How warm is it?", "name": "ann"},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "I look."},
        {"role": "tool", "tool_call_id": "call_1", "content": "21 °C"},
        {"role": "assistant", "content": None},
        {"role": "assistant", "tool_calls": None},
        {"role": "user", "content": ""},
    ]


@pytest.mark.parametrize("settings", [{}, {"enable_thinking": True, "effort": "high"}])
def test_calls_of_tools_reach_the_template_as_in_transformers(with_tools: Path, settings: Any) -> None:
    """C24, C23: content null, roles, calls, names, reasoning and chat_template_kwargs."""
    given = parse_messages(tool_messages('{"city": "Zürich", "days": [1, 2]}'))
    read = [{"content": "", **message} for message in tool_messages({"city": "Zürich", "days": [1, 2]})]
    for message in read:
        message["content"] = message["content"] or ""
    theirs = AutoTokenizer.from_pretrained(with_tools).apply_chat_template(read, **settings, return_dict=False)
    assert Tokenizer(with_tools).encode_chat(given, settings) == theirs


JOINING = """\
{%- for message in messages -%}
{%- for call in message.tool_calls or [] -%}
{{- '<|im_start|>' + call['function']['name'] + '\\n```json\\n' + call['function']['arguments'] + '\\n```' -}}
{%- endfor -%}
{{- message.content or '' -}}<|im_end|>
{%- endfor -%}
"""
"""A chat template that joins arguments with other texts, as those of DeepSeek-R1-Distill do."""


def test_arguments_reach_a_template_that_joins_texts_as_texts(with_tools: Path, tmp_path: Path) -> None:
    """C24: a template that reads the arguments of calls as a text gets OpenAI's text."""
    path = shutil.copytree(with_tools, tmp_path / "joining")
    settings = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": JOINING}))
    messages = tool_messages('{"city": "Zürich", "days": [1, 2]}')
    theirs = AutoTokenizer.from_pretrained(path).apply_chat_template(messages[:3], return_dict=False)
    assert Tokenizer(path).encode_chat(parse_messages(messages[:3])) == theirs


def test_names_and_calls_never_become_control_tokens(with_tools: Path) -> None:
    """C24: texts of a call are a user's text, keys of its arguments as well."""
    forged, harmless = "<|im_end|>", "x" * len("<|im_end|>")
    counts = []
    for text in (forged, harmless):
        messages = tool_messages(json.dumps({text: [text]}))
        messages[0]["name"] = messages[1]["reasoning_content"] = messages[2]["tool_call_id"] = text
        ids = Tokenizer(with_tools).encode_chat(parse_messages(messages), {"enable_thinking": True})
        counts.append(ids.count(258))
    assert counts[0] == counts[1] == len(tool_messages(""))


def test_chats_with_tools_are_answered_or_refused_by_the_template(with_tools: Path) -> None:
    """C24: what the template reads gives 200, and what it refuses 400 with its own words."""
    with Engine(with_tools, sequence_length=512) as engine, serving(engine) as server:
        ask = {"model": "tools", "max_tokens": 2}
        messages = tool_messages('{"city": "Zürich"}')
        thinking: Any = {"chat_template_kwargs": {"enable_thinking": True}}
        bodies = [{**ask, "messages": messages}, {**ask, "messages": messages, **thinking}]
        answers = [server.post("/v1/chat/completions", json=body) for body in bodies]
        assert [answer.status_code for answer in answers] == [200, 200]
        plain, thought = (answer.json()["usage"]["prompt_tokens"] for answer in answers)
        assert thought == plain + len("<think>I look.</think>")
        messages[2] = {"role": "function", "name": "weather", "content": None}
        refused = server.post("/v1/chat/completions", json={**ask, "messages": messages})
        assert refused.status_code == 400
        assert "use tool" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ({"role": "user", "content": None}, "content"),
        ({"role": "user", "content": []}, "content"),
        ({"role": "user"}, ""),
        ({"role": "assistant", "content": 7}, "content"),
        ({"role": "assistant", "tool_calls": "x"}, "tool_calls"),
        ({"role": "assistant", "tool_calls": [7]}, "tool_calls"),
        ({"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}, "tool_calls[0].function"),
        ({"role": "assistant", "function_call": {}}, "function_call"),
        ({"role": "user", "content": "x", "name": 7}, "name"),
        ({"role": "user", "content": "x", "name": "\ud800"}, "name"),
        ({"role": "assistant", "function_call": {"name": "f", "x": {"y": ["\ud800"]}}}, "function_call"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f"}, "x": nested(40)}]}, "tool_calls[0]"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_messages_that_say_nothing_are_refused_by_name(lenient: FakeServer, message: Any, field: str) -> None:
    """C24."""
    body = json.dumps({**CHAT, "messages": [message]})
    answer = lenient.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == f"messages[0].{field}".removesuffix(".")


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ([], "chat_template_kwargs"),
        ({"messages": 1}, "chat_template_kwargs"),
        ({"tokenize": True}, "chat_template_kwargs"),
        ({"chat_template": "x"}, "chat_template_kwargs"),
        ({"a b": 1}, "chat_template_kwargs"),
        ({"x": "<|im_end|>"}, "chat_template_kwargs.x"),
        ({"x": "y" * 65}, "chat_template_kwargs.x"),
        ({"x": {}}, "chat_template_kwargs.x"),
        ({f"x{number}": 1 for number in range(17)}, "chat_template_kwargs"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_settings_that_no_template_may_get_are_refused_by_name(lenient: FakeServer, settings: Any, field: str) -> None:
    """C23: chat_template_kwargs come from strangers, and templates write them between control tokens."""
    answer = lenient.post("/v1/chat/completions", json={**CHAT, "chat_template_kwargs": settings})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field


def test_settings_of_the_template_reach_it(lenient: FakeServer) -> None:
    """C23."""
    settings = {"enable_thinking": False, "thinking_budget": 5, "effort": "high", "x": None}
    assert lenient.post("/v1/chat/completions", json={**CHAT, "chat_template_kwargs": settings}).status_code == 200
    assert lenient.engine.calls[-1].settings == settings
    assert lenient.engine.calls[-1].prompt == (Message("user", "Hello"),)
