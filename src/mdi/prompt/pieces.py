"""What text the tokens of a tokenizer stand for: their bytes, and how few of them a text can have."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

FORMS: tuple[Literal["NFC", "NFD", "NFKC", "NFKD"], ...] = ("NFC", "NFD", "NFKC", "NFKD")
KEEPING = {"ByteLevel", "Metaspace", "Split", "Digits", "Punctuation", "Sequence"}  # pre-tokenizers that drop nothing
SPACE = "▁"
BLOCK = 1 << 20
COMPOSED = 8  # most bytes that characters on both sides of a cut can lose by becoming one


def _bytes_by_character() -> dict[str, bytes]:
    """The bytes behind the characters of byte-level BPE; printable ones are themselves (GPT-2's encoder.py)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
    return {character: bytes([byte]) for character, byte in characters.items()}


BYTES = _bytes_by_character()
BYTE_TOKENS = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}


class Pieces:
    """The pieces of text behind a tokenizer's ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        self._byte_level = "ByteLevel" in _kinds(tokenizer.decoder)
        self._marks_spaces = SPACE in json.dumps(_state(tokenizer.decoder), ensure_ascii=False)
        self._weights = self._shares() if self._keeps_all_text() else np.zeros(256)
        self._form = next((form for form in FORMS if form in _kinds(tokenizer.normalizer)), None)

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes of a token: part of a text in UTF-8, not always whole characters; b"" for an unused id."""
        return self._bytes(self._tokenizer.id_to_token(token_id) or "")

    def least_tokens(self, text: str, enough: int) -> int:
        """A number of tokens that this text does not fall short of, wherever it stands; 0 where none is known.

        A token stands for one piece of text, so each of its bytes is at least 1 / (the longest piece with such a byte)
        of a token. Nothing is tokenised, and counting ends at `enough`.
        """
        least = 0.0
        for start in range(0, len(text), BLOCK):
            least += self._share(text[start : start + BLOCK]) - (COMPOSED if start else 0)
            if least >= enough:
                break
        return max(0, int(least * (1 - 1e-9)))

    def _share(self, text: str) -> float:
        if self._form and not text.isascii():
            text = unicodedata.normalize(self._form, text)
        counts = np.bincount(np.frombuffer(text.encode(errors="replace"), np.uint8), minlength=256)
        return float(counts @ self._weights)

    def _bytes(self, name: str) -> bytes:
        if name in self._added:
            return name.encode()
        if self._byte_level:
            return b"".join(BYTES.get(character) or character.encode() for character in name)
        if name in BYTE_TOKENS:
            return BYTE_TOKENS[name]
        return (name.replace(SPACE, " ") if self._marks_spaces else name).encode()

    def _shares(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """For each byte: 1 / (length of the longest piece with such a byte)."""
        names = self._tokenizer.get_vocab(with_added_tokens=True)
        pieces = [self._bytes(name) for name in names]
        pieces += [name.encode() for name in names if SPACE in name and self._marks_spaces]  # a text may have it, too
        shares = np.ones(256)
        open_bytes = set(range(256))
        for piece in sorted(pieces, key=len, reverse=True):
            if found := open_bytes.intersection(piece):
                shares[list(found)] = 1 / len(piece)
                open_bytes -= found
        if any(token.lstrip or token.rstrip for token in self._tokenizer.get_added_tokens_decoder().values()):
            shares[[byte for byte in range(256) if not 0x20 < byte < 0x7F]] = 0  # such a token takes spaces around it
        return shares

    def _keeps_all_text(self) -> bool:
        """Whether every byte of a text, after a normalisation that can be done here, is in the piece of a token."""
        tokenizer, vocabulary = self._tokenizer, self._tokenizer.get_vocab(with_added_tokens=False)
        steps = [*_steps(tokenizer.normalizer), *_steps(tokenizer.pre_tokenizer)]
        if not all(_keeps(step) for step in steps):
            return False
        if any(step["type"] == "ByteLevel" for step in steps):
            alphabet = pre_tokenizers.ByteLevel.alphabet()
            return isinstance(tokenizer.model, models.BPE) and all(character in vocabulary for character in alphabet)
        falls_back: bool = json.loads(tokenizer.to_str())["model"].get("byte_fallback", False)
        return falls_back and all(name in vocabulary for name in BYTE_TOKENS)


def _keeps(step: dict[str, Any]) -> bool:
    if step["type"] == "Replace":
        return bool(step["pattern"] == {"String": " "} and step["content"] == SPACE)
    return step["type"] in {*KEEPING, *FORMS, "Prepend"} and step.get("behavior") != "Removed"


def _kinds(component: Any) -> set[str]:
    return {step["type"] for step in _steps(component)}


def _steps(component: Any) -> Iterator[dict[str, Any]]:
    """The settings of a normaliser, pre-tokenizer or decoder: one, or those of a sequence."""
    yield from _flat(_state(component))


def _flat(state: dict[str, Any]) -> Iterator[dict[str, Any]]:
    parts = next((state[name] for name in ("normalizers", "pretokenizers", "decoders") if name in state), None)
    if parts is not None:
        for part in parts:
            yield from _flat(part)
    elif state:
        yield state


def _state(component: Any) -> dict[str, Any]:
    return dict(json.loads(component.__getstate__())) if component is not None else {}
