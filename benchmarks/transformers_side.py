"""transformers as a side, with its defaults: sdpa attention, KV cache, logits of the last position only."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.serve_side import serve
from benchmarks.stage_side import patches


class Theirs:
    """One sequence, in bfloat16. Calls as in `benchmarks.stage_side`."""

    def __init__(self, path: str, threads: int) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

        torch.set_num_threads(threads)
        sees = hasattr(AutoConfig.from_pretrained(path), "vision_config")
        family = AutoModelForImageTextToText if sees else AutoModelForCausalLM
        self._model = family.from_pretrained(path, dtype=torch.bfloat16, local_files_only=True).eval()
        self._cache: Any = None
        self._token = torch.tensor([[0]])

    def prefill(self, ids: list[int]) -> None:
        """From nothing, in one batch."""
        out = self._model(input_ids=torch.tensor([ids]), use_cache=True, logits_to_keep=1)
        self._cache, self._token = out.past_key_values, out.logits[:, -1:].argmax(-1)

    def decode(self, n_tokens: int) -> None:
        """Greedy tokens after the prompt, which are dropped again."""
        token = self._token
        for _ in range(n_tokens):
            out = self._model(input_ids=token, past_key_values=self._cache, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
        self._cache.crop(-n_tokens)

    def encode(self, side: int) -> None:
        """An image of side x side patches."""
        self._model.model.visual(patches(side).bfloat16(), grid_thw=torch.tensor([[1, side, side]]))


if __name__ == "__main__":
    with torch.inference_mode():
        serve(Theirs)
