"""The tokenizer of the bundled checkpoint, and ChatML as token ids.

Byte-level BPE with Qwen's special tokens. Words of questions become tokens; what signs say stays letters and digits,
because no sign is in the corpus: reading is spelling.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
N_TEXT_TOKENS = 680
VOCAB_SIZE = 704  # text, special tokens, and spare rows up to a round number
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


class ChatTokens:
    """Pieces of a conversation as token ids, the same as the chat template gives for the whole."""

    def __init__(self, path: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(path))
        self.special: dict[str, int] = {text: self._tokenizer.token_to_id(text) or 0 for text in SPECIAL}
        self.end = self.special["<|im_end|>"]
        self.image_pad, self.video_pad = self.special["<|image_pad|>"], self.special["<|video_pad|>"]

    def text(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def last_characters(self, text: str) -> list[int]:
        """Index of the last character of each token of `text`."""
        return [end - 1 for _, end in self._tokenizer.encode(text, add_special_tokens=False).offsets]

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

    def answer(self, text: str) -> list[int]:
        return [*self.text(text), self.end]

    def turn_end(self) -> list[int]:
        return self.text("\n")
