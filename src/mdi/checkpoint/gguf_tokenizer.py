"""The tokenizer inside a GGUF file, written as the files that transformers reads.

Byte-level BPE is built here, with the splits of text that the file names; others (SentencePiece) are converted by
transformers. Splits: those of the models' own tokenizer.json, which llama.cpp names (`llama-vocab.cpp`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from mdi.core.errors import CheckpointError

CONTROL, USER_DEFINED = 3, 4  # types of tokens
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    "qwen2": _ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST,
    "llama-bpe": _ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST,
}
GPT2 = ("gpt-2", "default")
DIGITS_APART = ("smollm",)
NORMALISED = ("qwen2",)


def write_tokenizer(folder: Path, file: Path, fields: Mapping[str, Any]) -> None:
    """Writes tokenizer.json, tokenizer_config.json and generation_config.json.

    fields: the entries of the file. Raises CheckpointError for a tokenizer that is missing or not supported.
    """
    kind = fields.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise CheckpointError(f"GGUF files with a tokenizer of the kind {kind!r} are not supported")
    if kind == "gpt2":
        _write_byte_level(folder, fields)
    else:
        _convert(folder, file)
    ends = [fields[name] for name in ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id") if name in fields]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": sorted(set(ends))} if ends else {}))


def _write_byte_level(folder: Path, fields: Mapping[str, Any]) -> None:
    tokens, split = list(fields["tokenizer.ggml.tokens"]), str(fields.get("tokenizer.ggml.pre", "default"))
    merges = [tuple(merge.split(" ")) for merge in fields.get("tokenizer.ggml.merges", ())]
    tokenizer = Tokenizer(
        models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges, ignore_merges=True)
    )
    tokenizer.normalizer = normalizers.NFC() if split in NORMALISED else None
    tokenizer.pre_tokenizer = _pre_tokenizer(split)
    tokenizer.decoder = decoders.ByteLevel()
    types = list(fields.get("tokenizer.ggml.token_type", ()))
    named = {kind: [tokens[index] for index, each in enumerate(types) if each == kind] for kind in set(types)}
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in named.get(CONTROL, ())])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in named.get(USER_DEFINED, ())])
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for name, key in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding")):
        if (index := fields.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            settings[name] = tokens[index]
    if fields.get("tokenizer.ggml.add_bos_token") and "bos_token" in settings:
        first = settings["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", pair=f"{first} $A {first} $B", special_tokens=[(first, tokens.index(first))]
        )
    if template := fields.get("tokenizer.chat_template"):
        settings["chat_template"] = template
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False))


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


def _convert(folder: Path, file: Path) -> None:
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
