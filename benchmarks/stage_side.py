"""Our side: one stage with the whole model, without the engine around it. Run by `benchmarks.sides`."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from benchmarks.serve_side import serve
from mdi.checkpoint.loader import load_chunk
from mdi.core.batch import Batch, Slice, Token, TokenSampling
from mdi.core.config import CacheSettings
from mdi.kernels.threads import set_threads
from mdi.models.stage import Stage

GREEDY = TokenSampling(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, sample=0, position=0)


class Ours:
    """One sequence, of a chunk with the whole model."""

    def __init__(self, chunk: str, sequence_length: int, threads: int) -> None:
        set_threads(threads, "cpu")
        loaded = load_chunk(Path(chunk))
        self._stage = Stage(loaded, n_slots=1, sequence_length=sequence_length)
        self._length = 0
        self._token = 0

    def prefill(self, ids: list[int]) -> None:
        """From nothing, in batches as large as the engine makes them."""
        self._length = 0
        *first, last = torch.split(torch.tensor(ids), CacheSettings().batch_tokens)
        for chunk in first:
            self._step(chunk, samples=False)
        self._token = self._step(last)[0].id

    def decode(self, n_tokens: int, context: int) -> None:
        """Greedy tokens after the first `context` tokens of the prompt."""
        self._length, token = context, self._token
        for _ in range(n_tokens):
            token = self._step(torch.tensor([token]))[0].id

    def encode(self, side: int) -> None:
        """An image of side x side patches."""
        for _ in self._stage.encode_steps(patches(side), (1, side, side)):
            pass

    def logits(self, ids: list[int]) -> list[float]:
        """Of the token after these, read from nothing."""
        self._length = 0
        tokens = torch.tensor(ids)
        return self._stage.logits(self._batch(tokens, samples=False), self._stage.embed(tokens))[-1].tolist()

    def _step(self, ids: Tensor, *, samples: bool = True) -> tuple[Token, ...]:
        batch = self._batch(ids, samples=samples)
        self._length += len(ids)
        result = self._stage.sample(batch, self._stage.run(batch, self._stage.embed(ids)))
        assert result
        return result.tokens

    def _batch(self, ids: Tensor, *, samples: bool) -> Batch:
        positions = torch.arange(self._length, self._length + len(ids)).expand(3, -1)
        return Batch(0, (Slice(0, self._length, len(ids), (GREEDY,) * samples),), positions)


def patches(side: int) -> Tensor:
    """Rows of patches of a random image."""
    return torch.randn(side * side, 1176, generator=torch.Generator().manual_seed(0))


if __name__ == "__main__":
    with torch.inference_mode():
        serve(Ours)
