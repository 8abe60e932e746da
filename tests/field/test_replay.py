"""A replay gives the same text: the bits of a token do not depend on the batch that computes it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from testing.checkpoints import tiny_text_config
from torch import Tensor

from mdi.core.batch import Batch, Copy, Slice, TokenSampling
from mdi.core.tensors import Unquantized
from mdi.layers.linear import Linear
from mdi.layers.rope import text_positions
from mdi.models.config import StageSpec
from mdi.models.registry import read_config
from mdi.models.stage import Stage
from mdi.models.weights import load_stage

CPU = torch.device("cpu")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
LENGTH = 300  # tokens: three windows of keys, the last one in part
N_SLOTS = 4
SHAPES = {
    "of the bundled model": {
        "hidden_size": 192, "intermediate_size": 512, "num_attention_heads": 6, "num_key_value_heads": 2,
    },
    "of odd sizes": {
        "hidden_size": 72, "intermediate_size": 100, "num_attention_heads": 9, "num_key_value_heads": 3,
    },
    "of Qwen2-0.5B": {
        "hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2,
    },
}  # fmt: skip
SAMPLING = TokenSampling(
    temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=1, sample=0, position=LENGTH, top_logprobs=5
)


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    made: torch.dtype = request.param
    return made


@pytest.fixture(params=[1, pytest.param(2, marks=pytest.mark.slow)])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


def stage_of(shape: str, dtype: torch.dtype) -> Stage:
    config = read_config(tiny_text_config(num_hidden_layers=2, **SHAPES[shape]))

    def weight(name: str, size: tuple[int, ...], _dtype: str | None = None) -> Tensor:
        generator = torch.Generator().manual_seed(sum(map(ord, name)))
        return (torch.randn(size, generator=generator) / math.sqrt(size[-1]) + ("norm" in name)).to(dtype)

    loaded = load_stage(config, StageSpec.everything(config), CPU, Unquantized(weight, dtype))
    return Stage(loaded, n_slots=N_SLOTS, sequence_length=LENGTH + 1)


def tokens_of(seed: int) -> Tensor:
    return torch.randint(256, (LENGTH,), generator=torch.Generator().manual_seed(seed))


Part = tuple[int, int, int]  # seed of the tokens, which is also their slot; start; end


def run(stage: Stage, parts: Sequence[Part], copies: tuple[Copy, ...] = ()) -> list[tuple[Tensor, Tensor]]:
    """Runs one batch; hidden states and logits of each of its parts."""
    slices = tuple(Slice(slot, start, end - start) for slot, start, end in parts)
    positions = torch.cat([text_positions(start, end - start) for _, start, end in parts], dim=1)
    batch = Batch(0, slices, positions, copies)
    hidden = stage.run(batch, stage.embed(torch.cat([tokens_of(slot)[start:end] for slot, start, end in parts])))
    sizes = [part.length for part in slices]
    return list(zip(hidden.split(sizes), stage._decoder.logits(hidden).split(sizes), strict=True))  # type: ignore[no-untyped-call]


def rows(outcomes: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The outcomes of one sequence's parts, one after the other."""
    return torch.cat([hidden for hidden, _ in outcomes]), torch.cat([logits for _, logits in outcomes])


def same(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> bool:
    return torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@pytest.mark.parametrize("shape", [*list(SHAPES)[:2], pytest.param(*list(SHAPES)[2:], marks=pytest.mark.slow)])
def test_the_bits_of_a_token_do_not_depend_on_the_batch(shape: str, dtype: torch.dtype, threads: int) -> None:
    """A11: whole or in chunks, beside others or alone, token by token, after a copy or in a slot that was used."""
    stage = stage_of(shape, dtype)
    [whole] = run(stage, [(0, 0, LENGTH)])
    chunks = [0, 1, 3, 40, 47, 128, 131, 200, 256, 299, LENGTH]
    assert same(rows([run(stage, [(0, start, end)])[0] for start, end in pairwise(chunks)]), whole)
    beside = [run(stage, [(1, start, end), (0, start, end), (2, 0, 3)])[1] for start, end in pairwise(chunks)]
    assert same(rows(beside), whole)
    answer, others = [run(stage, [(0, 0, 240)])[0]], ((3, 0, 1), (1, 7, 8))
    answer += [run(stage, [(0, at, at + 1), *others[: at % 3]])[0] for at in range(240, LENGTH)]
    assert same(rows(answer), whole)
    tail = run(stage, [(3, 0, 5), (0, 137, LENGTH)], (Copy(0, 3, 200),))[1]  # keeps its prefix in place
    assert same(tail, (whole[0][137:], whole[1][137:]))


def test_a_copied_prefix_has_the_bits_of_a_computed_one(dtype: torch.dtype) -> None:
    """A11: in a slot that held other tokens, and numbers that are infinite."""
    stage = stage_of("of the bundled model", dtype)
    [whole] = run(stage, [(2, 0, LENGTH)])
    for layer in stage._cache.layers:
        layer[0], layer[2, 130:] = torch.nan, torch.nan
    copied = run(stage, [(1, 0, 3)], (Copy(2, 0, 130),))
    assert copied
    same_tokens = tokens_of(2)
    positions = text_positions(130, LENGTH - 130)
    batch = Batch(1, (Slice(0, 130, LENGTH - 130),), positions)
    hidden = stage.run(batch, stage.embed(same_tokens[130:]))
    assert torch.equal(hidden, whole[0][130:])


def test_a_draw_and_its_logprobs_do_not_depend_on_the_rows_beside_it(dtype: torch.dtype, threads: int) -> None:
    """A11: tokens, and every reported logprob."""
    stage = stage_of("of the bundled model", dtype)
    hidden = torch.randn(9, 192, generator=torch.Generator().manual_seed(0)).to(dtype)

    def drawn(rows: Sequence[int]) -> list[object]:
        slices = tuple(Slice(row % N_SLOTS, 0, 1, (replace(SAMPLING, seed=row),)) for row in rows)
        batch = Batch(0, slices, text_positions(0, len(rows)))
        result = stage.sample(batch, hidden[list(rows)])
        assert result
        return list(result.tokens)

    alone = [drawn([row])[0] for row in range(9)]
    for together in ([0, 1], [4, 2, 0], list(range(9)), [8, 7, 6, 5]):
        assert drawn(together) == [alone[row] for row in together]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("outputs", "inputs"), [(320, 192), (192, 512), (37, 29), pytest.param(896, 4864, marks=pytest.mark.slow)]
)
def test_products_round_alike_for_every_number_of_rows(
    outputs: int, inputs: int, bias: bool, dtype: torch.dtype, threads: int
) -> None:
    """A11: what the short test at load finds holds for the shapes of real models."""
    generator = torch.Generator().manual_seed(0)
    weights = {"a.weight": (outputs, inputs), "a.bias": (outputs,)}
    made = {name: torch.randn(size, generator=generator).to(dtype) for name, size in weights.items()}
    linear = Linear.load(Unquantized(lambda name, *_: made[name], dtype), {"a": outputs}, inputs, bias=bias)
    x, residual = torch.randn(200, inputs).to(dtype), torch.randn(200, outputs).to(dtype)
    product, total = linear(x), linear.add_to(residual, x)
    for n_rows in [*range(1, 20), 33, 64, 127, 199]:
        for part in (slice(n_rows), slice(200 - n_rows, 200)):
            assert torch.equal(linear(x[part]), product[part])
            assert torch.equal(linear.add_to(residual[part], x[part]), total[part])
