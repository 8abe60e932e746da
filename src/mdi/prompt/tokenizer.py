"""Text to token ids, and messages through the chat template. Text of users never becomes a control token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from mdi.checkpoint.tokenizer_files import check_tokenizer_files
from mdi.core.errors import CheckpointError, InputError
from mdi.core.messages import Message
from mdi.core.template_settings import TemplateSettings
from mdi.core.tools import Tool
from mdi.prompt.chat_template import Rendered, check_template_files, read_chat_template
from mdi.prompt.control_tokens import ControlTokens
from mdi.prompt.pieces import Pieces
from mdi.tools.families import ALL_MARKS, GENERIC, chosen_reasoning, chosen_syntax, reasoning_marks, syntax_of
from mdi.tools.generic import instructed
from mdi.tools.syntax import SYNTAXES

END_TOKENS = 32  # that hold the mark at a prompt's end, also where it is no token
SENTENCE = "The 2 quick brown foxes"


@dataclass(frozen=True)
class Thoughts:
    """Thoughts that may come before an answer.

    opened: the prompt has the mark that begins them. marks: the tokens that begin and end them, if each is one token.
    """

    opened: bool
    marks: tuple[int, int] | None


class Tokenizer:
    """A checkpoint's tokenizer and chat template, loaded by transformers. backend: the tokenizer itself.
    special_ids: its control tokens. tool_syntax: how the model writes calls of tools: see `mdi.tools`. reasoning: the
    marks around its thoughts, if it thinks; tool_call_parser and reasoning_parser: see `ModelSettings`.

    chat_template: a file with another template, or its text. Ids are those of transformers' `apply_chat_template`; see
    `ControlTokens` for text that holds control tokens. Raises CheckpointError, naming the file, where one is missing
    or damaged.
    """

    def __init__(
        self,
        path: Path,
        chat_template: str | None = None,
        tool_call_parser: str = "auto",
        reasoning_parser: str = "auto",
    ) -> None:
        self._loaded = _load(path)
        self.backend: Backend = self._loaded.backend_tokenizer
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = self._loaded.split_special_tokens
        _check_text(self.backend, path)
        self._template = template = read_chat_template(path, self._loaded, chat_template)
        text = template.text if template else ""
        syntax = syntax_of(text) if template and template.reads_tools else GENERIC
        self.tool_syntax = chosen_syntax(tool_call_parser, syntax)
        self.reasoning = chosen_reasoning(reasoning_parser, reasoning_marks(text, self.backend.get_vocab()))
        self._control = ControlTokens(
            self.backend, template.literals if template else [], computes=bool(template and template.computes)
        )
        self._pieces = Pieces(self.backend)
        added = self.backend.get_added_tokens_decoder()
        self.special_ids = frozenset(index for index, token in added.items() if token.special)

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    @property
    def special_marks(self) -> dict[str, int]:
        """The marks of calls and thoughts that are special tokens of this tokenizer, with their ids."""
        added = self.backend.get_added_tokens_decoder().items()
        return {token.content: index for index, token in added if token.special and token.content in ALL_MARKS}

    def thoughts(self, token_ids: Sequence[int]) -> Thoughts | None:
        """How the answer to a prompt of a chat may begin with thoughts; None where it may not."""
        if self.reasoning is None:
            return None
        start, end = self.reasoning
        text = self.decode(token_ids[-END_TOKENS:]).rstrip()
        if text.endswith(end):
            return None
        start_id, end_id = self.backend.token_to_id(start), self.backend.token_to_id(end)
        marks = None if start_id is None or end_id is None else (start_id, end_id)
        return Thoughts(text.endswith(start), marks)

    def token_bytes(self, token_id: int, *, skip_special_tokens: bool = False) -> bytes:
        """The bytes of a token: part of a text in UTF-8, not always whole characters; b"" for an unused id.

        skip_special_tokens: none for special tokens, as in a text without them.
        """
        return b"" if skip_special_tokens and token_id in self.special_ids else self._pieces.bytes_of(token_id)

    def least_tokens(self, text: str, enough: int) -> int:
        """A number of tokens that this text does not fall short of, found without tokenising it. See `Pieces`."""
        return self._pieces.least_tokens(text, enough)

    def encode(self, text: str) -> list[int]:
        """Plain text to ids, normalised first as the checkpoint asks; control tokens in it are plain text."""
        return self._control.encode_text(text)

    def with_text(self, token_ids: Sequence[int], text: str) -> list[int]:
        """Ids with a plain text behind them: those of one text from the last added token on, where words may join."""
        added = self.backend.get_added_tokens_decoder()
        start = next((index for index in range(len(token_ids), 0, -1) if token_ids[index - 1] in added), 0)
        return [*token_ids[:start], *self.encode(self.decode(token_ids[start:]) + text)]

    def encode_raw(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Text to ids as transformers does: special tokens by their names, and those that the tokenizer adds."""
        ids: list[int] = self._loaded(text, add_special_tokens=add_special_tokens, verbose=False).input_ids
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Ids to text, special tokens by their names."""
        return self.backend.decode(list(token_ids), skip_special_tokens=False)

    def encode_chat(
        self,
        messages: Sequence[Message],
        settings: TemplateSettings | None = None,
        check: Callable[[str], None] = lambda _: None,
        tools: Sequence[Tool] = (),
    ) -> list[int]:
        """Messages and tools through the chat template to ids, ready for the assistant's answer.

        settings: for the template. tools: an instruction in the system message where the template writes none. Every
        image and video becomes the placeholder that the template gives it. check: called with the rendered text before
        it is tokenised; may raise. Raises InputError where the template refuses the messages.
        """
        template = self._template
        if template is None:
            raise InputError("this model has no chat template: send a plain prompt instead of messages", "messages")

        if tools and (self.tool_syntax == GENERIC or not template.reads_tools):
            messages, tools = instructed(messages, tools, SYNTAXES[self.tool_syntax]), ()

        def render(conversation: Rendered) -> str:
            text = template.render(conversation, settings or {})
            check(text)
            return text

        return self._control.encode(template.conversation(messages, tools), render)


def _load(path: Path) -> Any:
    """transformers' tokenizer. Every file that it reads is read here first, so that an error names the file."""
    from transformers import AutoTokenizer

    check_tokenizer_files(path)
    check_template_files(path)
    try:
        loaded = AutoTokenizer.from_pretrained(path, local_files_only=True)
        assert isinstance(loaded.backend_tokenizer, Backend)
        loaded(SENTENCE, verbose=False)  # fails where a setting of the files has a wrong type
    except Exception as error:  # of any kind, of three libraries
        cause = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise CheckpointError(
            f"tokenizer.json and tokenizer_config.json make no tokenizer ({cause[0]}): download both again"
        ) from None
    return loaded


def _check_text(backend: Backend, path: Path) -> None:
    """Raises CheckpointError for a tokenizer that has no tokens for text, as one built without its vocabulary."""
    found = backend.encode(SENTENCE, add_special_tokens=False).tokens
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    if special.issuperset(found):
        raise CheckpointError(
            f"the tokenizer has no tokens for text: tokenizer.json in {path.name} is damaged; download it again"
        )
