"""Scheduled slices packed end to end: rows, positions, media and samplings of each, also across the prompt's end."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch import Tensor

from mdi.core.batch import Copy, Release, Slice, Token, Visual
from mdi.core.sampling import SamplingParams
from mdi.engine.packing import pack
from mdi.engine.scheduler import ScheduledSlice
from mdi.engine.sequence import Request, Sequence
from mdi.engine.stream import Stream
from mdi.layers.rope import MediaSpan
from mdi.media import Patches
from mdi.prompt.assembly import Media, Prompt

IMAGE = Patches(np.zeros((24, 2), dtype=np.float32), (1, 4, 6), b"digest")
PICTURE = Prompt(
    (65, 66, *[0] * 6, 67), torch.arange(27).view(3, 9), delta=-3, media=(Media(MediaSpan(2, (1, 4, 6), 2), IMAGE),)
)
EMBEDDINGS = torch.arange(6.0)[:, None] + 100
WORDS = Prompt((1, 2, 3), torch.arange(3).repeat(3, 1), delta=0, media=())


def sequence_of(prompt: Prompt, slot: int, *answer: int) -> Sequence:
    request = Request(Stream(lambda: None), SamplingParams().resolved(SamplingParams(), 50))
    request.set_prompt(prompt, Tokenizer(BPE()), frozenset(), sequence_length=64)
    request.embeddings = [EMBEDDINGS for _ in prompt.media]
    [sequence] = request.sequences
    sequence.slot = slot
    sequence.append(Token(token, 0.0) for token in answer)
    return sequence


def embed(token_ids: Tensor, visuals: list[Visual]) -> Tensor:
    hidden = token_ids.float()[:, None]
    for visual in visuals:
        hidden[visual.row : visual.row + len(visual.embeddings)] = visual.embeddings[:, :1]
    return hidden


def test_slices_stand_one_after_the_other() -> None:
    words, picture = sequence_of(WORDS, 4, 7), sequence_of(PICTURE, 2)
    scheduled = [ScheduledSlice(words, 3, 1, samples=True), ScheduledSlice(picture, 0, 5, samples=False)]
    edits = (Copy(1, 2, 3), Release(1, 0))
    batch, hidden = pack(9, scheduled, edits, embed)
    assert (batch.id, batch.edits) == (9, edits)
    assert batch.slices == (Slice(4, 3, 1, words.samplings(3, 4, draws=True)), Slice(2, 0, 5, ()))
    assert hidden.flatten().tolist() == [7, 65, 66, 100, 101, 102]
    expected = torch.cat((torch.full((3, 1), 3), PICTURE.positions[:, :5]), dim=1)
    assert torch.equal(batch.positions, expected)


@pytest.mark.parametrize("start", range(11))
@pytest.mark.parametrize("end", range(1, 12))
def test_any_part_of_prompt_and_answer_has_its_tokens_positions_and_embeddings(start: int, end: int) -> None:
    if start >= end:
        return
    sequence = sequence_of(PICTURE, 0, 70, 71)
    batch, hidden = pack(0, [ScheduledSlice(sequence, start, end - start, samples=end == 11)], (), embed)
    assert hidden.flatten().tolist() == [65, 66, 100, 101, 102, 103, 104, 105, 67, 70, 71][start:end]
    answer = torch.tensor([9 - 3, 10 - 3]).expand(3, -1)  # the next positions, shifted by the prompt's delta
    assert torch.equal(batch.positions, torch.cat((PICTURE.positions, answer), dim=1)[:, start:end])
    assert len(batch.samplings) == (end == 11)


def test_features_of_media_stand_beside_their_tokens() -> None:
    """Rows of the tower have an embedding and two features of one number each."""
    sequence, words = sequence_of(PICTURE, 0), sequence_of(WORDS, 1)
    sequence.request.embeddings = [torch.cat((EMBEDDINGS, EMBEDDINGS + 100, EMBEDDINGS + 200), dim=1)]
    scheduled = [ScheduledSlice(words, 0, 3, samples=True), ScheduledSlice(sequence, 4, 3, samples=False)]
    batch, hidden = pack(0, scheduled, (), embed)
    assert hidden.flatten().tolist() == [1, 2, 3, 102, 103, 104]
    assert batch.deepstack
    assert batch.deepstack.rows.tolist() == [3, 4, 5]
    assert batch.deepstack.features.flatten(1).tolist() == [[202, 203, 204], [302, 303, 304]]
    after = batch.beyond(1).deepstack
    assert after
    assert (after.first_layer, after.features.flatten().tolist()) == (1, [302, 303, 304])
    assert batch.beyond(2).deepstack is None
    text, _ = pack(0, [ScheduledSlice(words, 0, 3, samples=True)], (), embed)
    assert text.deepstack is None
