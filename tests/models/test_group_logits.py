"""All logits of the bundled model have the same bits on one node and in any groups, with the same number of shards."""

from __future__ import annotations

from itertools import accumulate, pairwise

import pytest
import torch
from testing.groups import ThreadGroup, one_thread, run_ranks
from torch import Tensor

from mdi.checkpoint.bundled import SHIPPED
from mdi.checkpoint.loader import load_source
from mdi.checkpoint.source import Source, open_source
from mdi.core.batch import Batch, Slice
from mdi.core.quantization import ModelQuantization
from mdi.layers.rope import text_positions
from mdi.models.config import StageSpec
from mdi.models.stage import Stage
from mdi.planning.plan import make_plan

PROMPT = 40
STEPS = (Slice(0, 0, PROMPT), Slice(0, PROMPT, 1), Slice(0, PROMPT + 1, 1))


@pytest.fixture(scope="module")
def source() -> Source:
    return open_source(SHIPPED)


def batch(index: int) -> Batch:
    part = STEPS[index]
    return Batch(index, (part,), text_positions(part.start, part.length))


def token_ids(source: Source) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, source.model_config.vocab_size, (part.length,), generator=generator) for part in STEPS]


def logits_of(source: Source, quantization: ModelQuantization, groups: tuple[int, ...], n_shards: int) -> list[Tensor]:
    """Of each step, [tokens, vocab_size]; every rank is a thread."""
    plan = make_plan(source.model_config, sum(groups), groups=groups, shards=n_shards, quantization=quantization)
    hidden = list[Tensor]()
    for first, end in pairwise([0, *accumulate(groups)]):
        hidden = stage_outputs(source, quantization, plan.stages[first:end], hidden, n_shards)
    return hidden


def stage_outputs(
    source: Source, quantization: ModelQuantization, specs: tuple[StageSpec, ...], inputs: list[Tensor], n_shards: int
) -> list[Tensor]:
    """Hidden states or logits of each step. inputs: hidden states; none for the first stage."""

    def computed(stage: Stage, index: int, hidden: Tensor) -> Tensor:
        return stage.logits(batch(index), hidden) if stage.spec.head else stage.forward(batch(index), hidden)

    def load(spec: StageSpec) -> Stage:
        loaded = load_source(source, spec, quantization=quantization)
        return Stage(loaded, n_slots=1, sequence_length=64, shards=n_shards)

    def led(stage: Stage) -> list[Tensor]:
        given = inputs or [stage.embed(ids) for ids in token_ids(source)]
        return [computed(stage, index, hidden) for index, hidden in enumerate(given)]

    def rank(group: ThreadGroup) -> list[Tensor]:
        stage = load(next(spec for spec in specs if spec.rank == group.rank))
        stage.group = group
        if group.rank.leads:
            return led(stage)
        return [computed(stage, index, group.follow()[1]) for index in range(len(STEPS))]

    if len(specs) == 1:
        with one_thread():
            return led(load(specs[0]))
    outputs = run_ranks([spec.rank for spec in specs if spec.rank], rank)
    return [torch.cat(parts, 1) for parts in zip(*outputs, strict=True)] if specs[0].head else outputs[0]


@pytest.mark.parametrize(
    ("name", "n_shards"),
    [(None, 4), ("int8", 3), ("int4", 4)],  # int8 has scales of two heads, of which there are six
    ids=["bfloat16", "int8", "int4"],
)
def test_logits_have_the_bits_of_one_node(name: str | None, n_shards: int, source: Source) -> None:
    quantization = ModelQuantization(name, name)
    alone = logits_of(source, quantization, (1,), n_shards)
    assert alone[0].shape == (PROMPT, source.model_config.vocab_size)
    assert alone[0].dtype == torch.bfloat16
    for groups in ((2,), (n_shards,), (2, 2)):
        grouped = logits_of(source, quantization, groups, n_shards)
        assert all(torch.equal(one, other) for one, other in zip(grouped, alone, strict=True)), groups
