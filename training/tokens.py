"""The tokenizer of the bundled checkpoint, and ChatML as token ids.

Byte-level BPE with Qwen's special tokens. Words of questions become tokens; what signs say stays letters and digits,
because no sign is in the corpus: reading is spelling. Tokens for JSON and calls of tools come behind the special ones:
the ids before them are those of checkpoints that knew neither.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, pairwise
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
CALLS = ("<tool_call>", "</tool_call>")  # tokens that are shown, as in Qwen2.5
N_TEXT_TOKENS = 680
VOCAB_SIZE = 832  # text, special tokens, calls, and the tokens that `with_json` adds
PIECES = (  # Qwen2's split into words: single digits, contractions, runs of punctuation
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SYSTEM = "You are a helpful assistant."
IGNORED = -100


def train_tokenizer(corpus: Iterable[str]) -> Tokenizer:
    """BPE over `corpus`. No normalizer: every string of Unicode comes back as it went in."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=N_TEXT_TOKENS, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    if tokenizer.get_vocab_size() != N_TEXT_TOKENS:
        raise ValueError(f"the corpus gives {tokenizer.get_vocab_size()} tokens, not {N_TEXT_TOKENS}")
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    return tokenizer


def with_json(tokenizer: Tokenizer, corpus: Iterable[str]) -> Tokenizer:
    """The tokenizer with tokens for calls, and with the most frequent merges of `corpus` behind its own merges.

    Words with capitals or digits are not merged: signs are spelled, whatever is around them. A tokenizer that has the
    tokens stays as it is.
    """
    if tokenizer.get_vocab_size() == VOCAB_SIZE:
        return tokenizer
    content = json.loads(tokenizer.to_str())
    vocabulary, merges = content["model"]["vocab"], content["model"]["merges"]
    for text in (*SPECIAL, *CALLS):
        vocabulary[text] = len(vocabulary)
    pieces = _pieces(tokenizer, corpus)
    while len(vocabulary) < VOCAB_SIZE:
        pairs: Counter[tuple[str, str]] = Counter()
        for piece, count in pieces.items():
            pairs.update(dict.fromkeys(pairwise(piece), count))
        left, right = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append([left, right])
        vocabulary[left + right] = len(vocabulary)
        pieces = Counter({_merged(piece, left, right): count for piece, count in pieces.items()})
    extended = Tokenizer.from_str(json.dumps(content))
    extended.add_tokens([AddedToken(text, special=False, normalized=False) for text in CALLS])
    return extended


def _pieces(tokenizer: Tokenizer, corpus: Iterable[str]) -> Counter[tuple[str, ...]]:
    """How often each word of the corpus is there, as tokens."""
    words = Counter(word for text in corpus for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text))
    pieces: Counter[tuple[str, ...]] = Counter()
    for word, count in words.items():
        if not re.search("[A-Z0-9]", word):
            pieces[tuple(token.value for token in tokenizer.model.tokenize(word))] += count
    return pieces


def _merged(piece: tuple[str, ...], left: str, right: str) -> tuple[str, ...]:
    merged: list[str] = []
    for token in piece:
        if merged and (merged[-1], token) == (left, right):
            merged[-1] = left + right
        else:
            merged.append(token)
    return tuple(merged)


class ChatTokens:
    """Pieces of a conversation as token ids, the same as the chat template gives for the whole."""

    def __init__(self, path: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(path))
        self.special: dict[str, int] = {text: self._tokenizer.token_to_id(text) or 0 for text in SPECIAL}
        self.end = self.special["<|im_end|>"]
        self.image_pad, self.video_pad = self.special["<|image_pad|>"], self.special["<|video_pad|>"]

    def text(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def first_characters(self, texts: Sequence[str]) -> list[int]:
        """Index in the joined texts of the first character of each token."""
        return [start for start, _ in self._offsets(texts)]

    def last_characters(self, texts: Sequence[str]) -> list[int]:
        """Index in the joined texts of the last character of each token."""
        return [end - 1 for _, end in self._offsets(texts)]

    def _offsets(self, texts: Sequence[str]) -> Iterator[tuple[int, int]]:
        before = 0
        for text in texts:
            for start, end in self._tokenizer.encode(text, add_special_tokens=False).offsets:
                yield before + start, before + end
            before += len(text)

    def decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def system(self, prompt: str) -> list[int]:
        start = self.special["<|im_start|>"]
        return [start, *self.text(f"system\n{prompt}"), self.end, *self.text("\n")]

    def user_start(self) -> list[int]:
        return [self.special["<|im_start|>"], *self.text("user\n")]

    def media(self, pad: int, n_tokens: int) -> list[int]:
        return [self.special["<|vision_start|>"], *[pad] * n_tokens, self.special["<|vision_end|>"]]

    def answer_start(self) -> list[int]:
        """What follows a question."""
        return [self.end, *self.text("\n"), self.special["<|im_start|>"], *self.text("assistant\n")]

    def answer(self, texts: Sequence[str]) -> list[int]:
        """Each text tokenized on its own."""
        return [*chain.from_iterable(map(self.text, texts)), self.end]

    def turn_end(self) -> list[int]:
        return self.text("\n")
