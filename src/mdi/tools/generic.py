"""Tools for models whose chat template knows none: an instruction, and calls and results as text of messages.

The tags are Hermes', which many models have met in training.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import groupby

from mdi.core.messages import Message, Part, TextPart
from mdi.core.tools import Tool
from mdi.tools.syntax import HERMES, Syntax

INSTRUCTION = """\
You may call functions to help with the request. These are the functions, one JSON object a line:
<tools>
{tools}
</tools>

To call a function, write exactly this, with its name and arguments:
{call}
The results come back between <tool_response> tags."""


def instructed(messages: Sequence[Message], tools: Sequence[Tool], syntax: Syntax = HERMES) -> tuple[Message, ...]:
    """The messages, with the instruction at the end of the first system message, which is made where there is none."""
    described = "\n".join(json.dumps(tool.described["function"], ensure_ascii=False) for tool in tools)
    call = syntax.written([("NAME", '{"ARGUMENT": "VALUE"}')])
    text = INSTRUCTION.format(tools=described, call=call)
    first, *rest = messages
    if first.role != "system":
        return (Message("system", text), *messages)
    if isinstance(first.content, str):
        return (replace(first, content=f"{first.content}\n\n{text}"), *rest)
    return (replace(first, content=(*first.content, TextPart(text))), *rest)


def with_written_calls(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The messages, their calls as text behind the content."""
    return tuple(map(_with_written_calls, messages))


def with_told_results(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The messages, results of tools that follow each other as one message of the user."""
    told: list[Message] = []
    for is_result, group in groupby(messages, lambda message: message.role in ("tool", "function")):
        found = list(group)
        told += [_told(found)] if is_result else found
    return tuple(told)


def _with_written_calls(message: Message) -> Message:
    details = dict(message.details)
    calls = [call["function"] for call in details.pop("tool_calls", ())]
    if function := details.pop("function_call", None):
        calls.append(function)
    if not calls:
        return message
    written = HERMES.written([(call["name"], _json(call.get("arguments", {}))) for call in calls])
    if not isinstance(message.content, str):
        return replace(message, content=(*message.content, TextPart(written)), details=details)
    return replace(message, content=f"{message.content}\n{written}".lstrip("\n"), details=details)


def _told(results: Sequence[Message]) -> Message:
    parts = list[Part]()
    for result in results:
        content = (TextPart(result.content),) if isinstance(result.content, str) else result.content
        parts += [TextPart("<tool_response>\n"), *content, TextPart("\n</tool_response>\n")]
    texts = [part.text for part in parts if isinstance(part, TextPart)]
    if len(texts) == len(parts):
        return Message("user", "".join(texts).rstrip("\n"))
    return Message("user", tuple(_joined(parts)))


def _joined(parts: Iterable[Part]) -> Iterable[Part]:
    """The parts, texts that follow each other as one."""
    for is_text, group in groupby(parts, lambda part: isinstance(part, TextPart)):
        if is_text:
            yield TextPart("".join(part.text for part in group if isinstance(part, TextPart)))
        else:
            yield from group


def _json(arguments: object) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
