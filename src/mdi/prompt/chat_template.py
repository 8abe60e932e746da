"""The chat template of a checkpoint: which file's counts, and in which form it reads the content of messages."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cache, cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jinja2

from mdi.checkpoint.json_file import read_file, read_json
from mdi.checkpoint.processing import PROCESSOR
from mdi.core.errors import CheckpointError, ConfigError, InputError
from mdi.core.messages import Message, Part, TextPart
from mdi.core.template_settings import TemplateSettings
from mdi.core.tools import Tool
from mdi.models.entries import CONFIG
from mdi.tools.generic import with_told_results, with_written_calls

Content = str | list[dict[str, str]]
Messages = list[dict[str, Any]]
Rendered = dict[str, Any]
"""What a template reads: messages and tools, by these names."""

JINJA, LEGACY, NAMED = "chat_template.jinja", "chat_template.json", "additional_chat_templates"
TOKENIZER_CONFIG = "tokenizer_config.json"
COMPUTING = ("striptags", "unescape", "%c")  # operations that write characters which are in no text
ID_ENDS = re.compile("[^a-zA-Z0-9]")
SHORT_ID = 9
RESULT = {"tool_call_id": "a2c4e6g8i"}  # nine letters or digits, as Mistral's
WORD, UNREAD = "probeword", "unread-field"  # in conversations that are rendered to see what a template reads


class ChatTemplate:
    """A chat template, rendered by transformers.

    tokenizer: transformers'. file: where the text is from. Raises CheckpointError, naming the file, for a text that is
    no template. literals: the texts that it can write by itself. computes: whether it can write other characters.
    """

    def __init__(self, tokenizer: Any, text: str, file: str) -> None:
        self._tokenizer = tokenizer
        self.text = text
        try:
            self.literals = list(_literals(text))
            with suppress(InputError):  # it may ask for other messages
                self._render([{"role": "user", "content": WORD}], {})
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(
                f"the chat template in {file} is damaged (line {error.lineno}: {error.message}): download it again"
            ) from None
        self.computes = any(operation in text for operation in COMPUTING)
        self._reads_as = cache(self._probe)

    @cached_property
    def reads_tools(self) -> bool:
        """Whether the template writes tools into the prompt."""
        parameters = {"type": "object", "properties": {}}
        tool = {"type": "function", "function": {"name": WORD, "description": WORD, "parameters": parameters}}
        for content in ("x", [{"type": "text", "text": "x"}]):
            with suppress(InputError):
                if WORD in self._render([{"role": "user", "content": content}], {}, [tool]):
                    return True
        return False

    def conversation(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> Rendered:
        """Messages and tools in the form of chat templates.

        A template that concatenates content gets the texts of its parts as one string, a line each; one that goes
        through parts gets a string as a list of one part. Content that it reads either way stays as it is.
        Calls, and results of tools, that it does not write are text of messages: see `mdi.tools.generic`.
        """
        if any("tool_calls" in message.details or "function_call" in message.details for message in messages):
            messages = messages if self._writes_calls else with_written_calls(messages)
        if any(message.role == "tool" for message in messages) and not any(self._reads_as("tool")):
            messages = with_told_results(messages)
        written = [
            {"role": message.role, "content": self._content(message.role, _content(message.content)), **message.details}
            for message in messages
        ]
        return {"messages": written, "tools": [tool.described for tool in tools]}

    def render(self, conversation: Rendered, settings: TemplateSettings = MappingProxyType({})) -> str:
        """The prompt's text, ready for the assistant's answer. Raises InputError where the template refuses.

        Templates that want calls in another form get them so: the arguments as JSON texts (DeepSeek's), short ids
        (Mistral's), or a message for each call, its result behind it (Llama's).
        """
        messages, tools = conversation["messages"], conversation["tools"] or None
        try:
            return self._render(messages, settings, tools)
        except InputError as error:
            for change in (_with_text_arguments, _with_short_ids, _with_single_calls):
                changed = change(messages)
                if changed != messages:
                    with suppress(InputError):
                        return self._render(changed, settings, tools)
            raise error

    def _render(self, messages: Messages, settings: TemplateSettings, tools: list[dict[str, Any]] | None = None) -> str:
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages,
                tools,
                chat_template=self.text,
                tokenize=False,
                **{"add_generation_prompt": True, **settings},
            )
            return text
        except jinja2.TemplateSyntaxError:
            raise
        except Exception as error:  # errors of jinja, and those that a template raises
            raise InputError(f"the model's chat template refuses these messages: {error}", "messages") from None

    def _content(self, role: str, content: Content) -> Content:
        reads_string, reads_parts = self._reads_as(role)
        if isinstance(content, str):
            return content if reads_string or not reads_parts else [{"type": "text", "text": content}]
        if reads_parts or not reads_string:
            return content
        return "\n".join(part["text"] for part in content if part["type"] == "text")

    @cached_property
    def _writes_calls(self) -> bool:
        """Whether the template writes the calls of a message."""
        for content in ("x", [{"type": "text", "text": "x"}]):
            user, result = {"role": "user", "content": content}, {"role": "tool", "content": content}
            calling = _calling(WORD)
            if any(self._shows(messages) for messages in ([user, calling], [user, calling, result | RESULT])):
                return True
        return False

    def _probe(self, role: str) -> tuple[bool, bool]:
        """Whether the template writes a message's content as a string, and as parts."""
        parts = [{"type": "text", "text": WORD, UNREAD: UNREAD}]
        return self._writes(role, WORD), self._writes(role, parts)

    def _writes(self, role: str, content: Any) -> bool:
        """Whether the text of this content appears in a rendered conversation, and not as a printed data structure."""
        probed = {"role": role, "content": content}
        for other in ("x", [{"type": "text", "text": "x"}]):
            user, assistant = {"role": "user", "content": other}, {"role": "assistant", "content": other}
            conversations = {
                "system": [[probed, user]],
                "user": [[probed]],
                "assistant": [[user, probed, user]],
                "tool": [[user, assistant, probed], [user, _calling("x"), probed | RESULT]],
            }
            if any(map(self._shows, conversations.get(role, [[user, assistant, probed]]))):
                return True
        return False

    def _shows(self, messages: Messages) -> bool:
        """Whether the probed word appears in a rendered conversation, and not as a printed data structure."""
        with suppress(InputError):
            text = self.render({"messages": messages, "tools": []})
            return WORD in text and UNREAD not in text
        return False


def _calling(name: str) -> dict[str, Any]:
    """A message that calls a tool."""
    call = {"id": RESULT["tool_call_id"], "type": "function", "function": {"name": name, "arguments": {}}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def _with_text_arguments(messages: Messages) -> Messages:
    """The messages, the arguments of their calls as JSON texts."""

    def changed(call: dict[str, Any]) -> dict[str, Any]:
        arguments = call["function"].get("arguments")
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return call | {"function": call["function"] | {"arguments": text}}

    return [_with_calls(message, map(changed, message.get("tool_calls") or ())) for message in messages]


def _with_short_ids(messages: Messages) -> Messages:
    """The messages, the ids of calls cut to their last letters and digits: Mistral's templates take nine."""

    def short(given: dict[str, Any], name: str) -> dict[str, Any]:
        return given | {name: ID_ENDS.sub("", given[name])[-SHORT_ID:]} if isinstance(given.get(name), str) else given

    return [
        _with_calls(short(message, "tool_call_id"), (short(call, "id") for call in message.get("tool_calls") or ()))
        for message in messages
    ]


def _with_single_calls(messages: Messages) -> Messages:
    """The messages, those of several calls as a message for each, with its result behind it."""
    changed: Messages = []
    rest = list(messages)
    while rest:
        message = rest.pop(0)
        calls = message.get("tool_calls") or ()
        n_results = next((n for n, later in enumerate(rest) if later["role"] != "tool"), len(rest))
        if len(calls) < 2 or n_results != len(calls):
            changed.append(message)
            continue
        results, rest = rest[:n_results], rest[n_results:]
        by_id = {result.get("tool_call_id"): result for result in results}
        for call, result in zip(calls, results, strict=True):
            changed += [message | {"tool_calls": [call]}, by_id.get(call.get("id"), result)]
            message = message | {"content": ""}
    return changed


def _with_calls(message: dict[str, Any], calls: Iterable[dict[str, Any]]) -> dict[str, Any]:
    return message | {"tool_calls": list(calls)} if message.get("tool_calls") else message


def read_chat_template(path: Path, tokenizer: Any, given: str | None = None) -> ChatTemplate | None:
    """The template that transformers uses: the processor's for models with a vision tower, else the tokenizer's.

    given: a file with another one, or its text. Raises CheckpointError, naming the file, for templates that are damaged
    or contradict each other, ConfigError for a given file that there is not.
    """
    if given is not None:
        return _given_template(given, tokenizer)
    found = _processor_template(path) if "vision_config" in read_json(path / CONFIG, optional=True) else None
    if found is None and tokenizer.chat_template is not None:
        stored = (name for name in (JINJA, NAMED) if (path / name).exists())
        found = tokenizer.chat_template, next(stored, TOKENIZER_CONFIG)
    if found is None and (path / LEGACY).exists():
        found = _processor_template(path)
    if found is None:
        return None
    template, file = found
    if isinstance(template, list):
        template = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
    if isinstance(template, dict):
        template = template.get("default")
    if not isinstance(template, str) or not template.strip():
        raise CheckpointError(f"{file} has no chat template with the name default: download it again")
    return ChatTemplate(tokenizer, template, file)


def _given_template(given: str, tokenizer: Any) -> ChatTemplate:
    """A text is told from a file's name by characters that templates have, as vLLM does."""
    if not any(sign in given for sign in "{}\n"):
        if not Path(given).is_file():
            raise ConfigError(f"there is no file {given!r} with a chat template: name one, or give its text")
        return ChatTemplate(tokenizer, _read_text(Path(given)), Path(given).name)
    return ChatTemplate(tokenizer, given, "--chat-template")


def _processor_template(path: Path) -> tuple[Any, str] | None:
    """What a processor's `from_pretrained` takes, and the file it is in."""
    named = {file.stem: _read_text(file) for file in sorted((path / NAMED).glob("*.jinja"))}
    legacy = read_json(path / LEGACY, optional=True)
    if named and legacy:
        raise CheckpointError(f"{LEGACY} and the folder {NAMED} contradict each other: remove one of them")
    template = read_json(path / PROCESSOR, optional=True).get("chat_template")
    if template is not None:
        return template, PROCESSOR
    if legacy:
        return legacy.get("chat_template"), LEGACY
    if (path / JINJA).exists():
        return named | {"default": _read_text(path / JINJA)}, JINJA
    return (named, NAMED) if named else None


def check_template_files(path: Path) -> None:
    """Raises CheckpointError, naming the file, for a template's own file that cannot be read."""
    for file in (path / JINJA, *sorted((path / NAMED).glob("*.jinja"))):
        if file.exists():
            _read_text(file)


def _read_text(path: Path) -> str:
    data = read_file(path) or b""
    try:
        return io.TextIOWrapper(io.BytesIO(data), encoding="utf-8").read()  # with the line ends of text files
    except UnicodeDecodeError:
        raise CheckpointError(f"{path.name} is not a text in UTF-8: download it again") from None


def _literals(template: str) -> Iterator[str]:
    """The texts that a template can write by itself. Raises jinja2.TemplateSyntaxError."""
    for _, kind, value in jinja2.Environment(autoescape=True).lex(template):
        if kind == "data":
            yield value
        elif kind == "string":
            yield value[1:-1].encode("ascii", "backslashreplace").decode("unicode-escape")


def _content(content: str | tuple[Part, ...]) -> Content:
    return content if isinstance(content, str) else [_part(part) for part in content]


def _part(part: Part) -> dict[str, str]:
    """A part as templates test it: by its type, or by the name of its content."""
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    return {"type": part.kind, part.kind: part.kind}
