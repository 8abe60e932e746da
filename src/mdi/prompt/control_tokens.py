"""Control tokens: only the chat template writes them, and templates read the text of users as it is."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from tokenizers import Tokenizer, models

from mdi.core.errors import InputError

Json = Any
"""What a template reads: strings, numbers, lists and dictionaries."""

PRIVATE_USE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))
OWN_FIELDS = frozenset(
    {"role", "content", "type", "text", "image", "video", "name", "reasoning_content"}
    | {"tool_calls", "tool_call_id", "function_call", "function", "arguments", "id"}
    | {"messages", "tools", "description", "parameters", "properties", "required", "items", "enum", "anyOf", "default"}
)
SCHEMA_TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
OWN_WORDS = {
    "role": ("system", "user", "assistant", "tool", "function"),
    "type": ("text", "image", "video", "function", *SCHEMA_TYPES),
}
"""Names of fields, and values, that are ours: templates compare and write them."""


class ControlTokens:
    """Encodes rendered conversations. A control token is an added token that the checkpoint declares special, unless
    the tokenizer makes it of plain text as well: that one cannot be told from text.

    A text that holds no control token, and of which none can be made, is encoded as it is rendered. Where a text holds
    one, a private-use character stands for its first character while the template is rendered: lengths stay true.
    Templates also cut, join, replace and lower-case text, which can make a token of harmless pieces. So a guarded copy
    is rendered, in which every character that could start a control token is replaced. Where its control tokens
    differ, the guarded rendering counts.

    template_texts: what the template itself can write. Where one of them ends with the start of a control token, text
    of users could complete it, and every character of control tokens is guarded. computes: whether it can write
    characters that are in no text; then, too.
    """

    def __init__(self, backend: Tokenizer, template_texts: Sequence[str], computes: bool) -> None:
        self._backend = backend
        self._finder = _finder(backend)
        self._text = TextBackend.of(backend)
        self._names = self._text.names
        characters = {name[0] for name in self._names}
        if computes or any(_ends_with_a_start(text, self._names) for text in template_texts):
            characters = set().union(*self._names)
        normalised = any(token.special and token.normalized for token in backend.get_added_tokens_decoder().values())
        self._guarded = _sources(characters, backend.normalizer.normalize_str if normalised else None)
        self._template_characters = frozenset().union(*template_texts)

    def encode_text(self, text: str) -> list[int]:
        """Plain text to ids: control tokens in it are text, other added tokens are recognised."""
        return self._text.encode(text)

    def encode(self, conversation: Json, render: Callable[[Json], str]) -> list[int]:
        """The ids of a rendered conversation, none of whose strings becomes a control token.

        Raises what `render` raises, and InputError where the tokenizer makes a control token of plain text.
        """
        texts = list(_strings(conversation))
        if not any(self._guarded.intersection(text) for text in texts):
            return self._backend.encode(render(conversation), add_special_tokens=False).ids
        guard = self._private_characters(texts)
        rendered = render(_mapped(conversation, lambda text: self._hidden(text, guard)))
        guarded = render(_mapped(conversation, lambda text: text.translate(guard)))
        if self._written(rendered) != self._written(guarded):
            rendered = guarded
        if not set(guard.values()).intersection(rendered):
            return self._backend.encode(rendered, add_special_tokens=False).ids
        return self._encode_marked(rendered, {ord(private): chr(plain) for plain, private in guard.items()})

    def _private_characters(self, texts: Sequence[str]) -> dict[int, str]:
        """A private-use character for each guarded one, none of which occurs in the texts or in the template."""
        used = self._template_characters.union(*texts)
        unused = (chr(code) for code in chain(*PRIVATE_USE) if chr(code) not in used)
        return {ord(plain): next(unused) for plain in sorted(self._guarded)}

    def _hidden(self, text: str, guard: dict[int, str]) -> str:
        """The text with the first character of every control token replaced."""
        pieces, end = [], 0
        for name, start, stop in self._find(text):
            at = text.find(name, start, stop)  # a token may take the spaces around it
            if at < 0:  # the normalised text has it
                return text.translate(guard)
            pieces += [text[end:at], guard[ord(text[at])]]
            end = at + 1
        return "".join([*pieces, text[end:]])

    def _encode_marked(self, rendered: str, plain: dict[int, str]) -> list[int]:
        """Encodes the template's control tokens as such, and everything else as text with its own characters."""
        pieces, end = [], 0
        for name, start, stop in self._find(rendered):
            pieces += [rendered[end:start].translate(plain), self._text.aliases[name]]
            end = stop
        ids = self._text.encode("".join([*pieces, rendered[end:].translate(plain)]))
        if self._text.control_names(ids) != [name for name in self._written(rendered) if name != self._text.unknown]:
            raise InputError(
                "a text holds a special token, which this model's tokenizer cannot read as text", "messages"
            )
        return ids

    def _written(self, text: str) -> list[str]:
        return [name for name, _, _ in self._find(text)]

    def _find(self, text: str) -> Iterator[tuple[str, int, int]]:
        """The control tokens that the tokenizer recognises in a text: name, start and end of what each takes."""
        found = self._finder.encode(text, add_special_tokens=False)
        for name, (start, stop) in zip(found.tokens, found.offsets, strict=True):
            if name in self._names:
                yield name, start, stop


@dataclass(frozen=True)
class TextBackend:
    """A copy of a tokenizer in which control tokens have secret names, so that their own names are text.

    names: of the control tokens. aliases: the secret names. unknown: the token for characters that the tokenizer does
    not know, if it has one.
    """

    backend: Tokenizer
    names: frozenset[str]
    aliases: dict[str, str]
    unknown: str | None
    _ids: dict[int, int]  # of added tokens: the copy's and the tokenizer's own
    _control: dict[int, str]

    @classmethod
    def of(cls, backend: Tokenizer) -> TextBackend:
        description = json.loads(backend.to_str()) | {"post_processor": None}
        added = [token["content"] for token in description["added_tokens"]]
        aliases = {token["content"]: _secret_name() for token in description["added_tokens"] if token["special"]}
        for token in description["added_tokens"]:
            token["content"] = aliases.get(token["content"], token["content"])
        unknown = _rename(description["model"], aliases)
        copy = Tokenizer.from_str(json.dumps(description))
        own, new = backend.get_vocab(), copy.get_vocab()
        ids = {new[aliases.get(name, name)]: own[name] for name in added}
        as_text = {name: [ids.get(token, token) for token in copy.encode(name).ids] for name in aliases}
        names = frozenset(name for name in aliases if name == unknown or as_text[name] != [own[name]])
        return cls(copy, names, aliases, unknown, ids, {own[name]: name for name in names if name != unknown})

    def encode(self, text: str) -> list[int]:
        """The ids that the tokenizer itself has for a text in which aliases stand for control tokens."""
        return [self._ids.get(token, token) for token in self.backend.encode(text, add_special_tokens=False).ids]

    def control_names(self, ids: Sequence[int]) -> list[str]:
        """Names of the control tokens among these ids, in order; without the unknown token, which text may hold."""
        return [self._control[token] for token in ids if token in self._control]


def _finder(backend: Tokenizer) -> Tokenizer:
    """A tokenizer that recognises what this one recognises as added tokens, and takes everything else as unknown."""
    finder = Tokenizer(models.WordLevel({"": 0}, unk_token=""))
    if backend.normalizer is not None:
        finder.normalizer = backend.normalizer
    for _, token in sorted(backend.get_added_tokens_decoder().items()):
        (finder.add_special_tokens if token.special else finder.add_tokens)([token])
    finder.encode_special_tokens = backend.encode_special_tokens
    return finder


def _rename(model: dict[str, Any], aliases: dict[str, str]) -> str | None:
    """Renames control tokens in a vocabulary, so that no text is cut into them. Returns the unknown token's name.

    Single characters stay, and names that merges make: without them text is lost, or the vocabulary is not valid.
    """
    unknown, vocabulary = model.get("unk_token"), model["vocab"]
    if isinstance(vocabulary, list):
        index = model.get("unk_id")
        unknown = vocabulary[index][0] if index is not None else None
        model["vocab"] = [[aliases.get(piece, piece), score] for piece, score in vocabulary]
        return unknown
    names = {name for name in aliases.keys() & vocabulary.keys() if len(name) > 1}
    for merge in model.get("merges", ()) if names else ():
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        names -= {left, right, left + right}
    model["vocab"] = {aliases[piece] if piece in names else piece: index for piece, index in vocabulary.items()}
    if unknown in names:
        model["unk_token"] = aliases[str(unknown)]
    return unknown


def _secret_name() -> str:
    """A name that no text holds by chance or on purpose; no letter or digit at its ends, as control tokens have."""
    return f"\ue000{secrets.token_hex(8)}\ue001"


def _ends_with_a_start(text: str, names: frozenset[str]) -> bool:
    """Whether the end of a text is the start of one of these names, and not the whole name."""
    return any(text.endswith(name[:length]) for name in names for length in range(1, len(name)))


def _sources(characters: set[str], normalise: Callable[[str], str] | None) -> frozenset[str]:
    """These characters, and those that another case, or `normalise`, turns into them."""
    if normalise is None and not any(character.isalpha() for character in characters):
        return frozenset(characters)
    changes = [str.lower, str.upper, str.title, str.casefold, *([normalise] if normalise else [])]
    plane = (chr(code) for code in chain(range(0xD800), range(0xE000, 0x10000)))
    changed = {found for found in plane if any(characters.intersection(change(found)) for change in changes)}
    return frozenset(characters | changed)


def _strings(value: Json, key: str = "") -> Iterator[str]:
    """Every string of a conversation that is not one of our own words, names of fields included."""
    if isinstance(value, str):
        if value not in OWN_WORDS.get(key, ()):
            yield value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _strings(item, name)
            if name not in OWN_FIELDS:
                yield name
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _mapped(value: Json, change: Callable[[str], str], key: str = "") -> Json:
    """The conversation with each of `_strings` changed."""
    if isinstance(value, str):
        return value if value in OWN_WORDS.get(key, ()) else change(value)
    if isinstance(value, dict):
        return {
            name if name in OWN_FIELDS else change(name): _mapped(item, change, name) for name, item in value.items()
        }
    return [_mapped(item, change) for item in value] if isinstance(value, list) else value
