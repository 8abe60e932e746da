"""Small tokenizers of the kinds that checkpoints have, beside the byte-level one of random checkpoints."""

from __future__ import annotations

import json
import string
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

SPECIAL = ("<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>")
ADDED = ("<think>", "</think>", "<tool_call>", "</tool_call>")  # and not special
MERGES = (("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "a"), ("i", "n"), ("in", "g"), ("▁", "▁"), ("e", "r"))


@cache
def byte_level_tokenizer() -> Tokenizer:
    """A token a byte, as in GPT-2 and Qwen; special and added tokens are not in the model's vocabulary."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[]))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ADDED])
    return tokenizer


@cache
def byte_fallback_tokenizer() -> Tokenizer:
    """BPE over words that start with U+2581, with a space put before the text, as in Llama 2 and Mistral.

    Characters without a token become byte tokens.
    """
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = [*SPECIAL, *byte_tokens, "▁", *string.ascii_letters, *string.digits, *"<|>/_.,:?!{}\"'\n"]
    pieces += [left + right for left, right in MERGES]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=list(MERGES),
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ADDED])
    return tokenizer


@cache
def prefixless_tokenizer() -> Tokenizer:
    """The same without a space before the text, but with <s>, as in Gemma."""
    tokenizer = Tokenizer.from_str(byte_fallback_tokenizer().to_str())
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


@cache
def metaspace_tokenizer() -> Tokenizer:
    """The same pieces in a Unigram model behind a Metaspace pre-tokenizer, as in T5: it knows no bytes.

    <s> is put before every text.
    """
    pieces = [*SPECIAL, "▁", *string.ascii_letters, *string.digits, *"<|>/_.,:?!{}\"'\n"]
    pieces += [left + right for left, right in MERGES]
    tokenizer = Tokenizer(models.Unigram([(piece, -float(index)) for index, piece in enumerate(pieces)], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    tokenizer.add_tokens([AddedToken(text, normalized=False, rstrip=True) for text in ADDED])
    return tokenizer


def write_tokenizer(path: Path, tokenizer: Tokenizer, template: str, **settings: Any) -> Path:
    """Writes the files of a tokenizer that AutoTokenizer loads, its chat template in tokenizer_config.json."""
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"} | settings
    (path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}), "utf-8")
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}), "utf-8")
    return path
