"""Text to token ids, and the chat template. Text of users never becomes a special token."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mdi.checkpoint.tokenizer_files import check_tokenizer_files
from mdi.core.errors import CheckpointError, InputError
from mdi.core.messages import Message, Part, TextPart
from mdi.core.template_settings import TemplateSettings
from tokenizers import Tokenizer as Backend


def _bytes_by_character() -> dict[str, bytes]:
    """The bytes behind the characters of byte-level BPE; printable ones are themselves (GPT-2's encoder.py)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
    return {character: bytes([byte]) for character, byte in characters.items()}


BYTES = _bytes_by_character()


class Tokenizer:
    """A checkpoint's tokenizer and chat template, loaded by transformers.

    Special tokens are recognised only where the template writes them. While the template is rendered, a random mark
    follows each character of a user's text that could start one; the text between special tokens is encoded by a copy
    of the tokenizer without special tokens. backend: the tokenizer itself, for detokenizers.
    """

    def __init__(self, path: Path) -> None:
        from transformers import AutoTokenizer

        check_tokenizer_files(path)
        try:
            loaded = AutoTokenizer.from_pretrained(path, local_files_only=True)
        except Exception as error:  # of any kind, of three libraries
            cause = str(error).strip().splitlines()[:1] or [type(error).__name__]
            raise CheckpointError(
                f"tokenizer.json and tokenizer_config.json make no tokenizer ({cause[0]}): download both again"
            ) from None
        if loaded.chat_template is None and (path / "chat_template.json").exists():
            loaded.chat_template = json.loads((path / "chat_template.json").read_text())["chat_template"]
        self._loaded = loaded
        self.backend: Backend = loaded.backend_tokenizer
        added = {token.content: index for index, token in loaded.added_tokens_decoder.items()}
        self._special_ids = added
        self._special = re.compile("|".join(map(re.escape, sorted(added, key=len, reverse=True))) or r"(?!)")
        self._first_characters = re.compile("|".join(map(re.escape, sorted({text[0] for text in added}))) or r"(?!)")
        self._plain = _without_added_tokens(self.backend)

    @property
    def has_chat_template(self) -> bool:
        return self._loaded.chat_template is not None

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token: part of a text in UTF-8, not always whole characters; b"" for an unused id."""
        text = self.backend.id_to_token(token_id)
        if text is None or text in self._special_ids:
            return (text or "").encode()
        return b"".join(BYTES.get(character) or character.encode() for character in text)

    def encode(self, text: str) -> list[int]:
        """Plain text to ids, normalised first as the checkpoint asks; special tokens in it are plain text."""
        return self._plain.encode(text, add_special_tokens=False).ids

    def encode_raw(self, text: str) -> list[int]:
        """Text to ids as transformers does: special tokens by their names, and those that the tokenizer adds."""
        ids: list[int] = self._loaded(text, verbose=False).input_ids
        return ids

    def encode_chat(self, messages: Sequence[Message], settings: TemplateSettings | None = None) -> list[int]:
        """Messages through the chat template to ids, ready for the assistant's answer. settings: for the template.

        Every image and video becomes the placeholder that the template gives it.
        """
        mark = f"\ue000{secrets.token_hex(8)}\ue001"
        guarded = [
            {"role": message.role, "content": self._content(message.content, mark)}
            | {name: self._guarded(value, mark) for name, value in message.details.items()}
            for message in messages
        ]
        try:
            text = self._loaded.apply_chat_template(
                guarded, tokenize=False, add_generation_prompt=True, **(settings or {})
            )
        except Exception as error:  # errors of jinja, and those that a template raises
            raise InputError(f"the model's chat template refuses these messages: {error}", "messages") from None
        return self._encode_template(text, mark)

    def _content(self, content: str | tuple[Part, ...], mark: str) -> str | list[dict[str, str]]:
        """A message's content in the form of chat templates, its texts guarded."""
        if isinstance(content, str):
            return self._guard(content, mark)
        return [
            {"type": "text", "text": self._guard(part.text, mark)}
            if isinstance(part, TextPart)
            else {"type": part.kind}
            for part in content
        ]

    def _guarded(self, value: Any, mark: str) -> Any:
        """A JSON value, all its texts guarded."""
        if isinstance(value, Mapping):
            return {self._guard(name, mark): self._guarded(item, mark) for name, item in value.items()}
        if isinstance(value, list):
            return [self._guarded(item, mark) for item in value]
        return self._guard(value, mark) if isinstance(value, str) else value

    def _guard(self, text: str, mark: str) -> str:
        return self._first_characters.sub(lambda found: found[0] + mark, text)

    def _encode_template(self, text: str, mark: str) -> list[int]:
        ids: list[int] = []
        end = 0
        for special in self._special.finditer(text):
            ids += self.encode(text[end : special.start()].replace(mark, ""))
            ids.append(self._special_ids[special[0]])
            end = special.end()
        return ids + self.encode(text[end:].replace(mark, ""))


def _without_added_tokens(backend: Backend) -> Backend:
    description = json.loads(backend.to_str())
    description["added_tokens"] = []
    description["post_processor"] = None
    return Backend.from_str(json.dumps(description))
