"""A stage draws the same tokens whether they are computed one at a time or several in one slice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from testing.checkpoints import tiny_text_config
from torch import Tensor

from mdi.core.batch import Batch, Deepstack, Slice, Token, TokenSampling
from mdi.core.errors import LinkError
from mdi.core.tensors import Unquantized
from mdi.layers.rope import text_positions
from mdi.models.config import StageSpec
from mdi.models.registry import read_config
from mdi.models.stage import Stage
from mdi.models.weights import load_stage

CONFIG = read_config(tiny_text_config(num_hidden_layers=3))
PROMPT = list(range(40, 60))
GREEDY = TokenSampling(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=3, sample=0, position=0)
WARM = replace(GREEDY, temperature=1.0, top_p=0.95)


def weight(name: str, shape: tuple[int, ...], _dtype: str | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    return torch.randn(shape, generator=generator) / 4 + ("norm" in name)


@pytest.fixture(scope="module")
def stage() -> Stage:
    loaded = load_stage(CONFIG, StageSpec.everything(CONFIG), torch.device("cpu"), Unquantized(weight, torch.float32))
    return Stage(loaded, n_slots=2, sequence_length=64)


def step(stage: Stage, slot: int, start: int, ids: list[int], samplings: Sequence[TokenSampling]) -> tuple[Token, ...]:
    batch = Batch(start, (Slice(slot, start, len(ids), tuple(samplings)),), text_positions(start, len(ids)))
    result = stage.sample(batch, stage.run(batch, stage.embed(torch.tensor(ids))))
    assert result
    return result.tokens


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "warm"])
def test_several_samplings_in_a_slice_draw_what_single_ones_draw(stage: Stage, sampling: TokenSampling) -> None:
    def at(position: int) -> TokenSampling:
        return replace(sampling, position=position)

    ids, start = PROMPT, 0
    answer: list[Token] = []
    for _ in range(8):
        answer += step(stage, 0, start, ids, (at(start + len(ids)),))
        start, ids = start + len(ids), [answer[-1].id]
    step(stage, 1, 0, PROMPT[:-1], ())
    drafts = [PROMPT[-1], *(token.id for token in answer[:-1])]
    together = step(stage, 1, 19, drafts, [at(20 + index) for index in range(8)])
    assert [token.id for token in together] == [token.id for token in answer]
    assert [token.logprob for token in together] == pytest.approx([token.logprob for token in answer], abs=1e-4)
    last_three = step(stage, 1, 19, drafts, [at(20 + index) for index in range(5, 8)])
    assert [token.id for token in last_three] == [token.id for token in answer[5:]]


def test_a_batch_without_samplings_draws_nothing(stage: Stage) -> None:
    assert step(stage, 0, 0, PROMPT, ()) == ()


@pytest.mark.parametrize(
    "part", [Slice(2, 0, 3), Slice(99, 0, 3), Slice(0, 62, 3), Slice(0, 2**40, 3), Slice(-1, 0, 3)]
)
def test_a_batch_beyond_the_cache_is_refused_before_anything_is_written(stage: Stage, part: Slice) -> None:
    batch = Batch(0, (part,), text_positions(0, 3))
    with pytest.raises(LinkError, match="but has 2 slots of 64 tokens"):
        stage.run(batch, torch.zeros(3, CONFIG.hidden_size))


@pytest.mark.parametrize(("rows", "positions"), [(2, 3), (3, 2), (4, 4)])
def test_a_batch_whose_parts_differ_in_length_is_refused(stage: Stage, rows: int, positions: int) -> None:
    batch = Batch(0, (Slice(0, 0, 3),), text_positions(0, positions))
    with pytest.raises(LinkError, match="for 3 tokens"):
        stage.run(batch, torch.zeros(rows, CONFIG.hidden_size))


@pytest.mark.parametrize(
    ("rows", "shape", "first_layer"),
    [
        ([0, 3], (1, 2, 64), 0),
        ([-1, 1], (1, 2, 64), 0),
        ([1, 1], (1, 2, 64), 0),
        ([0, 1], (1, 1, 64), 0),
        ([0, 1], (1, 2, 63), 0),
        ([0, 1], (4, 2, 64), 0),
        ([0, 1], (1, 2, 64), 1),
    ],
)
def test_features_that_do_not_fit_the_batch_are_refused(
    stage: Stage, rows: list[int], shape: tuple[int, ...], first_layer: int
) -> None:
    deepstack = Deepstack(torch.tensor(rows), torch.zeros(shape), first_layer)
    batch = Batch(0, (Slice(0, 0, 3),), text_positions(0, 3), deepstack=deepstack)
    with pytest.raises(LinkError, match="got features of shape"):
        stage.run(batch, torch.zeros(3, CONFIG.hidden_size))
