"""Scheduled slices to a batch and its embeddings, packed end to end without padding. Holds no state."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from mdi.core.batch import Batch, CacheEdit, Slice, Visual
from mdi.engine.scheduler import ScheduledSlice
from mdi.engine.sequence import Sequence
from mdi.models.stage import deepstack_of

Embed = Callable[[Tensor, list[Visual]], Tensor]


def pack(
    batch_id: int, scheduled: Iterable[ScheduledSlice[Sequence]], edits: tuple[CacheEdit, ...], embed: Embed
) -> tuple[Batch, Tensor]:
    """The batch of these slices, and its embeddings: [tokens, hidden_size]."""
    slices, positions, token_ids, visuals = list[Slice](), list[Tensor](), list[int](), list[Visual]()
    for item in scheduled:
        sequence, start, end = item.sequence, item.start, item.start + item.length
        assert sequence.slot is not None
        slices.append(Slice(sequence.slot, start, item.length, sequence.samplings(start, end, draws=item.samples)))
        positions.append(_positions(sequence, start, end))
        visuals += _visuals(sequence, start, end, row=len(token_ids))
        token_ids += sequence.token_ids(start, end)
    hidden = embed(torch.tensor(token_ids), visuals)
    deepstack = deepstack_of(visuals, hidden.shape[1])
    return Batch(batch_id, tuple(slices), torch.cat(positions, dim=1), edits, deepstack), hidden


def _positions(sequence: Sequence, start: int, end: int) -> Tensor:
    """Rotary positions of a sequence's tokens [start, end): int64 [3, end - start]."""
    prompt = sequence.prompt
    if end <= len(prompt.token_ids):
        return prompt.positions[:, start:end]
    n_prompt = max(0, len(prompt.token_ids) - start)
    answer = torch.arange(start + n_prompt, end) + prompt.delta
    return torch.cat((prompt.positions[:, start : start + n_prompt], answer.expand(3, -1)), dim=1)


def _visuals(sequence: Sequence, start: int, end: int, row: int) -> list[Visual]:
    """The parts of the prompt's media that lie in [start, end), which is packed from `row` on."""
    visuals = []
    for media, embeddings in zip(sequence.prompt.media, sequence.request.embeddings, strict=False):
        first, last = max(start, media.span.start), min(end, media.span.start + media.span.length)
        if first < last:
            offset = media.span.start
            visuals.append(Visual(row + first - start, embeddings[first - offset : last - offset]))
    return visuals
