"""One stage at work: a batch in, activations or tokens out. Knows the model and its cache, no network, no requests."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from mdi.checkpoint.load import LoadedStage
from mdi.model.attention import CausalMasks, Layout
from mdi.model.batch import Batch, Token, Visual
from mdi.model.kv_cache import KVCache
from mdi.model.rope import DecoderRope, Grid
from mdi.model.sampler import sample


class Stage:
    """A loaded stage with its KV cache: `n_slots` rows of `sequence_length` tokens. Used by one thread at a time."""

    def __init__(self, loaded: LoadedStage, *, n_slots: int, sequence_length: int) -> None:
        config, dtype, device = loaded.config, loaded.dtype, loaded.device
        self.spec = loaded.spec
        self.config = config
        self.device = device
        self._decoder = loaded.decoder
        self._vision = loaded.vision
        self._rope = DecoderRope(config.head_dim, config.rope_theta, config.mrope_section, dtype, device)
        self._cache = KVCache(config, len(loaded.spec.layers), n_slots, sequence_length, dtype, device)
        self._masks = CausalMasks(sequence_length, dtype, device)

    def embed(self, token_ids: Tensor, visuals: Sequence[Visual] = ()) -> Tensor:
        """Token embeddings with the media's own in place of their placeholders.

        token_ids: int64 [tokens] -> [tokens, hidden_size] in the stage's dtype.
        """
        hidden = self._decoder.embed(token_ids)
        for visual in visuals:
            hidden[visual.row : visual.row + len(visual.embeddings)] = visual.embeddings
        return hidden

    @torch.inference_mode()
    def run(self, batch: Batch, hidden: Tensor) -> Tensor | tuple[Token, ...]:
        """Runs the stage's layers: hidden [tokens, hidden_size] -> the same, or the drawn tokens where the head is."""
        hidden = self.forward(batch, hidden)
        if not self.spec.head:
            return hidden
        draws = batch.draws
        return sample(self._decoder.logits(hidden[batch.drawn_rows]), draws) if draws else ()

    @torch.inference_mode()
    def logits(self, batch: Batch, hidden: Tensor) -> Tensor:
        """Logits of every token of the batch, for comparisons: [tokens, vocab_size]. Only where the head is."""
        return self._decoder.logits(self.forward(batch, hidden))

    def forward(self, batch: Batch, hidden: Tensor) -> Tensor:
        """The stage's layers alone: [tokens, hidden_size] -> [tokens, hidden_size]."""
        layout = Layout.of(batch.slices, self._masks, self.device)
        rotation = self._rope(batch.positions.to(self.device))
        return self._decoder.forward(hidden.to(self.device), rotation, self._cache, layout)

    def encode_steps(self, rows: Tensor, grid: Grid) -> Generator[None, None, Tensor]:
        """Encodes one image or video, yielding between blocks. rows: float32 [patches, patch_elements]."""
        assert self._vision is not None
        return self._vision.encode_steps(rows, grid)
