"""Tools and calls: as transformers renders them, true of the picture, and made only where a tool fits."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from random import Random
from typing import Any

import jsonschema
import pytest
from training.chat_template import CHAT_TEMPLATE
from training.held_out import tool_exams
from training.layout import Plan
from training.questions import Question
from training.samples import BatchMaker
from training.scenes import SceneMaker
from training.tokens import ChatTokens
from training.tool_calls import (
    ACT,
    CANNOT,
    LOOK_UP,
    PAINT,
    ROLES,
    TELL,
    Tool,
    Workshop,
    listed,
    read_call,
    read_result,
)
from training.unknown import UNKNOWN
from transformers import AutoTokenizer

from mdi.checkpoint.random_weights import CHAT_TEMPLATE as WITHOUT_TOOLS
from mdi.core.messages import Conversation
from mdi.core.tools import parse_tools
from mdi.engine import Engine

SYSTEM = "Answer briefly."


@pytest.fixture(scope="module")
def engine(untrained: Path) -> Iterator[Engine]:
    with Engine(untrained, dtype="float32") as engine:
        yield engine


def conversations(count: int, held_out: bool = False) -> Iterator[tuple[list[Tool], list[Question]]]:
    for index in range(count):
        maker = SceneMaker(f"tools {index}", held_out)
        scene, workshop = maker.still(112, 84), Workshop(maker.random, held_out)
        tools = workshop.tools()
        if conversation := workshop.conversation(scene, tools):
            yield tools, conversation


@pytest.fixture(scope="module")
def tokenizer(untrained: Path) -> Any:
    return AutoTokenizer.from_pretrained(untrained)


def test_prompts_and_calls_are_those_of_the_template_and_of_the_engine(
    tokens: ChatTokens, tokenizer: Any, engine: Engine
) -> None:
    rendered = 0
    for tools, conversation in islice(conversations(80), 40):
        if len(conversation) < 2:
            continue
        rendered += 1
        call, result = conversation
        ids = [*tokens.system(listed(SYSTEM, tools)), *tokens.user_start(), *tokens.text(call.text)]
        ids += [*tokens.answer_start(), *tokens.answer([call.answer]), *tokens.turn_end(), *tokens.user_start()]
        ids += [*tokens.text(result.text), *tokens.answer_start()]
        messages: list[dict[str, Any]] = [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": call.text},
            {"role": "assistant", "tool_calls": [{"type": "function", "function": read_call(call.answer)}]},
            {"role": "tool", "content": read_result(result.text)},
        ]
        schemas = [tool.schema() for tool in tools]
        text = tokenizer.apply_chat_template(messages, tools=schemas, tokenize=False, add_generation_prompt=True)
        assert tokenizer(text, add_special_tokens=False).input_ids == ids
        assert list(engine.tokenize(Conversation(messages, tools=parse_tools(schemas)))) == ids
    assert rendered > 10


def test_calls_are_valid_and_only_of_listed_tools() -> None:
    kinds = set()
    for tools, (question, *_) in conversations(300):
        call = read_call(question.answer)
        kinds.add(question.skill)
        if call is None:
            assert question.answer in ((CANNOT, UNKNOWN) if tools else (UNKNOWN,))
            assert not any(tool.key in question.text.lower() and tool.family == "act" for tool in tools)
            continue
        (schema,) = (tool.schema()["function"] for tool in tools if tool.name == call["name"])
        jsonschema.validate(call["arguments"], schema["parameters"] | {"additionalProperties": False})
    assert kinds == {"tool", "no tool"}


def test_calls_are_about_the_picture() -> None:
    """Colours and shapes of calls are together those of a thing there; counts are those of its kind."""
    judged = 0
    for index in range(200):
        maker = SceneMaker(f"grounded {index}")
        scene, workshop = maker.still(112, 84), Workshop(maker.random)
        (things,) = [picture.things for picture in scene.pictures]
        tools = workshop.tools()
        conversation = workshop.conversation(scene, tools) or [Question("", "", "")]
        call = read_call(conversation[0].answer)
        if call is None:
            continue
        judged += 1
        (tool,) = (tool for tool in tools if tool.name == call["name"])
        values = {argument.role: call["arguments"][argument.name] for argument in tool.arguments}
        fitting = [
            thing
            for thing in things
            if values.get("shape") in (None, thing.kind)
            if values.get("color") in (None, thing.color)
            if values.get("text") in (None, thing.text)
        ]
        assert fitting
        if "count" in values and "shape" in values:
            assert values["count"] == len(fitting)
    assert judged > 60


def test_what_is_told_says_all_there_is_to_know(maker: BatchMaker) -> None:
    batch = maker(3, Plan("told", (4, 4), 1, 20))
    assert batch.rows.numel() == 0
    judged = 0
    for question in chain.from_iterable(batch.questions):
        call = read_call(question.answer)
        if call is not None:
            judged += 1
            assert all(value in question.text for value in call["arguments"].values())
    assert judged > 20


def test_names_are_those_that_clients_may_give() -> None:
    names = {tool.name for index in range(500) for tool in Workshop(Random(index)).tools()}
    assert all(re.fullmatch("[a-z_]+", name) for name in names)


def test_without_tools_the_template_writes_what_that_of_qwen_writes(tokenizer: Any) -> None:
    parts = [{"type": "image"}, {"type": "text", "text": "What is it?"}, {"type": "video"}]
    user, assistant = {"role": "user", "content": parts}, {"role": "assistant", "content": "red"}
    given: list[Any] = [SYSTEM, [{"type": "text", "text": SYSTEM}]]
    systems: list[list[dict[str, Any]]] = [[], *([{"role": "system", "content": content}] for content in given)]
    more: list[list[dict[str, Any]]] = [[], [assistant, user]]
    for messages in [[*system, user, *turns] for system in systems for turns in more]:
        texts = {
            tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=True)
            for template in (CHAT_TEMPLATE, WITHOUT_TOOLS)
        }
        assert len(texts) == 1


@pytest.mark.parametrize(
    ("function", "line"),
    [
        ({"name": "stop"}, "stop()"),
        ({"name": "stop", "description": "Stop.", "parameters": {}}, "stop(): Stop."),
        (
            {
                "name": "go",
                "parameters": {
                    "type": "object",
                    "properties": {
                        "to": {"type": "string", "description": "where"},
                        "fast": {"type": "boolean"},
                        "by": {"enum": ["car"]},
                        "any": True,
                    },
                    "required": ["to", "by"],
                },
            },
            "go(to: string (where), fast?: boolean, by, any?)",
        ),
    ],
)
def test_tools_of_any_schema_are_listed(function: dict[str, Any], line: str, tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "Go."}]
    for tool in (function, {"type": "function", "function": function}):
        text = tokenizer.apply_chat_template(messages, tools=[tool], tokenize=False)
        assert f"<tools>\n{line}\n</tools><|im_end|>\n<|im_start|>user\nGo.<|im_end|>" in text


def test_several_calls_and_results_are_written_one_below_the_other(tokenizer: Any) -> None:
    calls = [
        {"function": {"name": name, "arguments": arguments}} for name, arguments in (("a", {"n": 1}), ("b", '{"n":2}'))
    ]
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "Go."},
        {"role": "assistant", "content": "Well.", "tool_calls": calls},
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": [{"type": "text", "text": "2"}]},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text.endswith(
        '<|im_start|>assistant\nWell.\n<tool_call>\n{"name": "a", "arguments": {"n": 1}}\n</tool_call>\n'
        '<tool_call>\n{"name": "b", "arguments": {"n":2}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response><|im_end|>\n"
    )


def test_held_out_requests_share_no_names_with_training() -> None:
    for training, held_out in (ACT, TELL, PAINT, LOOK_UP, *ROLES.values()):
        assert not set(training) & set(held_out)
    named = {
        argument.name for tools, _ in conversations(60, held_out=True) for tool in tools for argument in tool.arguments
    }
    assert named <= {name for _, held_out in ROLES.values() for name in held_out}


def test_the_exam_judges_calls_by_their_values() -> None:
    exams = list(tool_exams(30))
    called = [(exam, call) for exam in exams if (call := read_call(exam.question.answer))]
    followed = [exam for exam in exams if exam.call]
    assert called
    assert followed
    for exam, call in called:
        assert exam.right("", [json.loads(json.dumps(call))])
        assert not exam.right("", [call, call])
        assert not exam.right("", [call | {"name": "other"}])
        assert not exam.right(exam.question.answer)
    for exam in followed:
        _, assistant, result = exam.messages()
        assert json.loads(assistant["tool_calls"][0]["function"]["arguments"]) == (exam.call or {})["arguments"]
        assert result["content"] in exam.question.text
        assert exam.right(exam.question.answer)


def test_a_batch_of_requests_asks_and_calls(maker: BatchMaker) -> None:
    batch = maker(4, Plan("tools", (4, 5), 1, 12))
    skills = {question.skill for questions in batch.questions for question in questions}
    assert {"tool", "tool result", "no tool"} < skills
    again = maker(4, Plan("tools", (4, 5), 1, 12))
    assert batch.ids.equal(again.ids)
