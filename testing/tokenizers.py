"""Small tokenizers of the kinds that checkpoints have, beside the byte-level one of random checkpoints."""

from __future__ import annotations

import string
from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

SPECIAL = ("<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>")
ADDED = ("</think>", "<tool_call>")  # and not special
MERGES = (("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "a"), ("i", "n"), ("in", "g"), ("▁", "▁"), ("e", "r"))


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
