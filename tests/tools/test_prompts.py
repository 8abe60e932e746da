"""Tools, calls and results in prompts: ids as transformers gives them, and control tokens that no text makes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from testing.small_tokenizers import SPECIAL
from testing.tool_templates import ALTERNATING, LLAMA3_1, MARKS, MISTRAL, MISTRAL_ARGS, PLAIN, QWEN2_5, QWEN3, TEMPLATES
from transformers import AutoTokenizer

from mdi.core.messages import parse_messages
from mdi.core.tools import Tool, parse_tools
from mdi.prompt.tokenizer import Thoughts, Tokenizer
from tests.tools.conftest import MakeTokenizer

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "description": "Where, é."}, "days": {"type": ["integer", "null"]}},
    "required": ["city"],
}
GIVEN: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "clock", "description": "<b>&amp;"}},
]
TOOLS = parse_tools(GIVEN)


def call(name: str, arguments: Any, number: int = 1) -> dict[str, Any]:
    return {"id": f"callcall{number}", "type": "function", "function": {"name": name, "arguments": arguments}}


def chat(arguments: Any, *, calls: int = 1) -> list[dict[str, Any]]:
    """Two turns with calls, as a client sends them back."""
    made = [call("weather", arguments, number) for number in range(1, calls + 1)]
    results = [{"role": "tool", "tool_call_id": made["id"], "content": '{"warm": 21}'} for made in made]
    return [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "How warm is it?"},
        {"role": "assistant", "content": None, "tool_calls": made},
        *results,
        {"role": "assistant", "content": "21."},
        {"role": "user", "content": "And now?"},
    ]


@pytest.mark.parametrize("family", TEMPLATES)
@pytest.mark.parametrize("n_messages", [2, 4, 6])
@pytest.mark.parametrize("tools", [TOOLS, ()], ids=["tools", "none"])
def test_tools_calls_and_results_have_the_ids_of_transformers(
    tokenizer_with: MakeTokenizer, family: str, n_messages: int, tools: tuple[Tool, ...]
) -> None:
    ours, path = tokenizer_with(TEMPLATES[family])
    theirs = AutoTokenizer.from_pretrained(path)
    theirs.chat_control_tokens = []  # special tokens only
    read = chat({"city": "Zürich", "days": 2})[:n_messages]
    read = [message | {"content": message["content"] or ""} for message in read]
    expected = theirs.apply_chat_template(
        read, tools=GIVEN if tools else None, add_generation_prompt=True, return_dict=False
    )
    sent = parse_messages(chat('{"city": "Zürich", "days": 2}')[:n_messages])
    assert ours.encode_chat(sent, tools=tools) == expected


@pytest.mark.parametrize(
    ("template", "syntax"),
    [
        (QWEN2_5, "hermes"),
        (QWEN3, "hermes"),
        (LLAMA3_1, "llama3_json"),
        (MISTRAL, "mistral"),
        (MISTRAL_ARGS, "mistral_args"),
        (PLAIN, "generic"),
    ],
)
def test_the_family_is_found_from_the_template(tokenizer_with: MakeTokenizer, template: str, syntax: str) -> None:
    assert tokenizer_with(template)[0].tool_syntax == syntax


def text_of(tokenizer_with: MakeTokenizer, template: str, messages: list[dict[str, Any]], tools: Any = ()) -> str:
    tokenizer, _ = tokenizer_with(template)
    return tokenizer.decode(tokenizer.encode_chat(parse_messages(messages), tools=tools))


def test_ids_of_any_length_reach_a_template_that_takes_nine_letters(tokenizer_with: MakeTokenizer) -> None:
    messages = chat("{}")
    messages[2]["tool_calls"][0]["id"] = messages[3]["tool_call_id"] = "call_ab-12_0123456789"
    text = text_of(tokenizer_with, MISTRAL, messages, TOOLS)
    assert text.count("123456789") == 2


def test_a_template_that_takes_single_calls_gets_them_one_after_the_other(tokenizer_with: MakeTokenizer) -> None:
    messages = chat("{}", calls=2)
    messages[3], messages[4] = messages[4], messages[3]  # results in another order
    messages[3]["content"], messages[4]["content"] = "second", "first"
    text = text_of(tokenizer_with, LLAMA3_1, messages, TOOLS)
    turns = [text.index(part) for part in ('"first"', '"second"')]
    assert turns == sorted(turns)
    assert text.count('{"name": "weather", "parameters": {}}') == 2


@pytest.mark.parametrize("template", [PLAIN, ALTERNATING], ids=["plain", "alternating"])
def test_a_template_without_tools_gets_an_instruction_and_calls_as_text(
    tokenizer_with: MakeTokenizer, template: str
) -> None:
    text = text_of(tokenizer_with, template, chat('{"city": "Zürich"}', calls=2), TOOLS)
    system, asked, called, told, *_ = text.split("<|end|>\n")
    assert "Be brief." in system
    for tool in GIVEN:
        assert json.dumps(tool["function"], ensure_ascii=False) in system
    assert asked == "<|user|>user\nHow warm is it?"
    written = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
    assert called == f"<|user|>assistant\n{written}\n{written}"
    result = '<tool_response>\n{"warm": 21}\n</tool_response>'
    assert told == (f"<|user|>user\n{result}\n{result}" if template == ALTERNATING else told)
    assert told.count('{"warm": 21}') == (2 if template == ALTERNATING else 1)


def test_without_a_system_message_the_instruction_is_one(tokenizer_with: MakeTokenizer) -> None:
    text = text_of(tokenizer_with, PLAIN, [{"role": "user", "content": "Hi"}], TOOLS[:1])
    assert text.startswith("<|user|>system\nYou may call functions")
    assert '{"name": "NAME", "arguments": {"ARGUMENT": "VALUE"}}' in text


OPENING = QWEN3.replace(
    "{{- '<|assistant|>\\n' }}\n    {%- if enable", "{{- '<|assistant|>\\n<think>\\n' }}\n    {%- if enable"
)


@pytest.mark.parametrize(
    ("template", "settings", "opened"),
    [(QWEN3, {}, False), (QWEN3, {"enable_thinking": False}, None), (OPENING, {}, True), (QWEN2_5, {}, False)],
    ids=["may think", "may not", "thinks", "knows the marks"],
)
def test_the_prompt_says_how_thoughts_may_begin(
    tokenizer_with: MakeTokenizer, template: str, settings: dict[str, Any], opened: bool | None
) -> None:
    tokenizer, _ = tokenizer_with(template)
    assert tokenizer.reasoning == ("<think>", "</think>")
    forged = parse_messages([{"role": "user", "content": "say <think>"}])
    thoughts = tokenizer.thoughts(tokenizer.encode_chat(forged, settings))
    vocabulary = tokenizer.backend.get_vocab()
    marks = (vocabulary["<think>"], vocabulary["</think>"])
    assert thoughts == (None if opened is None else Thoughts(opened, marks))


def test_settings_choose_the_family(tokenizer_with: MakeTokenizer) -> None:
    _, path = tokenizer_with(QWEN3)
    chosen = Tokenizer(path, None, "mistral", "none")
    assert (chosen.tool_syntax, chosen.reasoning, chosen.thoughts([1])) == ("mistral", None, None)
    _, path = tokenizer_with(MISTRAL_ARGS)
    assert Tokenizer(path, None, "mistral").tool_syntax == "mistral_args"
    _, path = tokenizer_with(PLAIN)
    messages = parse_messages([{"role": "user", "content": "Hi"}])
    told = Tokenizer(path, None, "llama3_json")
    assert '{"name": "NAME", "parameters": {"ARGUMENT"' in told.decode(told.encode_chat(messages, tools=TOOLS))


FORGED = st.sampled_from([*SPECIAL, *MARKS, "<|", "user", "|>", "<", "s>", "[TOOL_", "CALLS]", "[", "\ue000", "é", '"'])
TEXT = st.lists(FORGED, max_size=4).map("".join)


@settings(max_examples=30, deadline=None)
@given(family=st.sampled_from(sorted(TEMPLATES)), texts=st.lists(TEXT, min_size=7, max_size=7))
def test_no_text_of_tools_calls_or_results_makes_a_control_token(
    tokenizer_with: MakeTokenizer, family: str, texts: list[str]
) -> None:
    """As many control tokens, in the same order, as with harmless text."""
    tokenizer, _ = tokenizer_with(TEMPLATES[family])

    def control(texts: list[str]) -> list[int]:
        description, key, value, name, argument, result, thought = texts
        schema = {"type": "object", "properties": {key or "k": {"type": "string", "enum": [value]}}, name or "n": value}
        tools = parse_tools(
            [{"type": "function", "function": {"name": "get", "description": description, "parameters": schema}}],
            lambda _: None,
        )
        messages = chat(json.dumps({argument: [value]}))
        messages[2] |= {"reasoning_content": thought, "content": name}
        messages[3]["content"] = result
        ids = tokenizer.encode_chat(parse_messages(messages), tools=tools)
        return [token for token in ids if token in tokenizer.special_ids]

    harmless = [text.translate(str.maketrans("<>|[]", "()/()")) for text in texts]
    assert control(texts) == control(harmless)
