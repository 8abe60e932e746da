"""The tokenizer inside a GGUF file, written as the files that transformers reads.

Byte-level BPE has the splits of text that the file names: those of the models' own tokenizer.json, which llama.cpp
names (`llama-vocab.cpp`). SentencePiece is BPE whose merges follow from the pieces' scores, as in transformers'
`SpmConverter`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from mdi.core.errors import CheckpointError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # types of tokens
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    "qwen2": _ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST,
    "llama-bpe": _ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST,
}
GPT2 = ("gpt-2", "default")
DIGITS_APART = ("smollm",)
NORMALISED = ("qwen2",)
WHOLE_WORDS = ("llama-bpe",)  # a word that is a token is one, whatever its merges
END_OF_TURN = "<end_of_turn>"  # Gemma's; files need not name it, as llama.cpp knows it by its text
SPACE = "▁"  # of SentencePiece
LONGEST_PIECE = 256  # characters; SentencePiece makes pieces of 16 unless told otherwise


@dataclass(frozen=True)
class _Vocabulary:
    """The tokens of a file, with their types and, in SentencePiece, scores."""

    tokens: list[str]
    kinds: list[int]
    scores: list[float]

    @classmethod
    def read(cls, entries: Mapping[str, Any]) -> _Vocabulary:
        tokens = list(entries["tokenizer.ggml.tokens"])
        kinds = list(entries.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens)))
        return cls(tokens, kinds, list(entries.get("tokenizer.ggml.scores", ())))

    @property
    def ids(self) -> dict[str, int]:
        return {token: index for index, token in enumerate(self.tokens)}

    def of(self, *kinds: int) -> list[str]:
        """The tokens of some types."""
        return [token for token, kind in zip(self.tokens, self.kinds, strict=True) if kind in kinds]


def write_tokenizer(folder: Path, entries: Mapping[str, Any]) -> None:
    """Writes tokenizer.json, tokenizer_config.json and generation_config.json.

    entries: of the file. Raises CheckpointError for a tokenizer that is missing or not supported.
    """
    kind = entries.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise CheckpointError(f"GGUF files with a tokenizer of the kind {kind!r} are not supported")
    vocabulary = _Vocabulary.read(entries)
    tokenizer = _byte_level(vocabulary, entries) if kind == "gpt2" else _sentence_piece(vocabulary, entries)
    specials = vocabulary.of(UNKNOWN, CONTROL)
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in specials])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in vocabulary.of(USER_DEFINED)])
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for name, key in (("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding")):
        if (index := entries.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            settings[name] = vocabulary.tokens[index]
    if entries.get("tokenizer.ggml.add_bos_token", kind == "llama") and "bos_token" in settings:
        first = settings["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", pair=f"{first} $A {first} $B", special_tokens=[(first, vocabulary.ids[first])]
        )
    if template := entries.get("tokenizer.chat_template"):
        settings["chat_template"] = template
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False))
    ends = {entries[name] for key in ("eos", "eot") if (name := f"tokenizer.ggml.{key}_token_id") in entries}
    ends |= {vocabulary.ids[END_OF_TURN]} if END_OF_TURN in vocabulary.of(CONTROL) else set()
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": sorted(ends)} if ends else {}))


def _byte_level(vocabulary: _Vocabulary, entries: Mapping[str, Any]) -> Tokenizer:
    split = str(entries.get("tokenizer.ggml.pre", "default"))
    merges = [tuple(merge.split(" ")) for merge in entries.get("tokenizer.ggml.merges", ())]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary.ids, merges=merges, ignore_merges=split in WHOLE_WORDS))
    tokenizer.normalizer = normalizers.NFC() if split in NORMALISED else None
    tokenizer.pre_tokenizer = _pre_tokenizer(split)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pre_tokenizer(split: str) -> pre_tokenizers.PreTokenizer:
    if split in GPT2:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if split in DIGITS_APART:
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    if split not in SPLITS:
        known = ", ".join((*GPT2, *DIGITS_APART, *SPLITS))
        raise CheckpointError(f"the GGUF file splits text as {split!r}, which is not supported; supported: {known}")
    parts = pre_tokenizers.Split(Regex(SPLITS[split]), "isolated")
    return pre_tokenizers.Sequence([parts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _sentence_piece(vocabulary: _Vocabulary, entries: Mapping[str, Any]) -> Tokenizer:
    """Spaces are pieces of words, one more stands before a text, and characters without a piece are bytes."""
    unknown = vocabulary.tokens[entries.get("tokenizer.ggml.unknown_token_id", 0)]
    bytes_ = bool(vocabulary.of(BYTE))
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary.ids, merges=_merges(vocabulary), unk_token=unknown, fuse_unk=True, byte_fallback=bytes_
        )
    )
    prefix = entries.get("tokenizer.ggml.add_space_prefix", True)
    first = [normalizers.Prepend(SPACE)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", SPACE)])
    last = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *last]
    )
    return tokenizer


def _merges(vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """All pairs of pieces that make a piece, in the order of that piece's score."""
    if len(vocabulary.scores) != len(vocabulary.tokens):
        raise CheckpointError("the GGUF file has no score for each piece of its tokenizer: convert the model anew")
    ids = {token: index for token, index in vocabulary.ids.items() if vocabulary.kinds[index] == NORMAL}
    found = list[tuple[float, int, int, tuple[str, str]]]()
    for piece, index in ids.items():
        if len(piece) > LONGEST_PIECE:
            raise CheckpointError(
                f"the tokenizer of the GGUF file has a piece of {len(piece)} characters: it is damaged"
            )
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in ids and right in ids:
                found.append((-vocabulary.scores[index], ids[left], ids[right], (left, right)))
    return [pair for *_, pair in sorted(found)]
