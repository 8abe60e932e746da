"""Scenarios to measure: a number of streams, with prompts and images of a size. All prompts differ."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from mdi.core.sampling import SamplingParams

TEMPLATE_TOKENS = 64  # of a chat template, at most
FEWEST_DIGITS = 8  # enough for prompts to differ


@dataclass(frozen=True)
class Scenario:
    """Requests that start together. image_side: side of each one's square image in pixels; None for no image."""

    streams: int
    prompt_tokens: int
    image_side: int | None
    answer_tokens: int

    @property
    def name(self) -> str:
        """Streams x tokens of each prompt + pixels of each image."""
        return f"{self.streams} x {self.prompt_tokens}" + (f" + {self.image_side}²" if self.image_side else "")

    @property
    def sequence_length(self) -> int:
        """Tokens that one stream needs: an image has a token for each 28 x 28 pixels, or a row more."""
        image = (self.image_side // 28 + 1) ** 2 if self.image_side else 0
        return self.prompt_tokens + image + self.answer_tokens + TEMPLATE_TOKENS

    @property
    def params(self) -> SamplingParams:
        """Greedy, and exactly answer_tokens long."""
        return SamplingParams(temperature=0, max_tokens=self.answer_tokens, ignore_eos=True)

    def prompts(self, seed: int) -> list[list[dict[str, Any]]]:
        """One conversation for each stream. seed: another seed gives other prompts, which are in no cache."""
        return [self._prompt(np.random.default_rng((seed, stream))) for stream in range(self.streams)]

    def _prompt(self, random: np.random.Generator) -> list[dict[str, Any]]:
        digits = max(FEWEST_DIGITS, self.prompt_tokens)  # a token each, in the tokenizers of Qwen
        text = "".join(map(str, random.integers(0, 10, digits)))
        if self.image_side is None:
            return [{"role": "user", "content": text}]
        image = {"type": "image", "image": noise(self.image_side, random)}
        return [{"role": "user", "content": [image, {"type": "text", "text": text}]}]


def sweep(
    streams: Sequence[int], prompt_tokens: Sequence[int], image_sides: Sequence[int], answer_tokens: int
) -> list[Scenario]:
    """Scenarios that vary one thing at a time: streams (with the first length, no image), then lengths, then images."""
    several = [Scenario(count, prompt_tokens[0], None, answer_tokens) for count in streams]
    longer = [Scenario(1, length, None, answer_tokens) for length in prompt_tokens]
    with_image = [Scenario(1, prompt_tokens[0], side, answer_tokens) for side in image_sides]
    return list(dict.fromkeys([*several, *longer, *with_image]))


def noise(side: int, random: np.random.Generator) -> bytes:
    """A PNG of random pixels, which is in no cache. Its content does not change the cost."""
    buffer = io.BytesIO()
    Image.fromarray(random.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()
