"""A layer is the same layer on one rank and on two, and its variants are fields of the config."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from testing.checkpoints import tiny_text_config
from torch import Tensor

from mdi.core.batch import Slice
from mdi.core.reduce import Reduce, alone
from mdi.core.tensors import Unquantized
from mdi.layers.attention import Layout
from mdi.layers.rope import DecoderRope, text_positions
from mdi.models.config import ModelConfig
from mdi.models.decoder import DecoderLayer
from mdi.models.registry import read_config

CPU = torch.device("cpu")
CONFIG = read_config(tiny_text_config())
HALF = replace(CONFIG, n_heads=2, n_kv_heads=1, intermediate_size=64)
N_TOKENS = 9


def weight(name: str, shape: tuple[int, ...], _dtype: str | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    return torch.randn(shape, generator=generator) / 8 + ("norm" in name)


def part_of(rank: int, name: str, shape: tuple[int, ...], _dtype: str | None = None) -> Tensor:
    """A rank's half of a weight: of its outputs, or of the inputs of the products that are reduced."""
    axis = 1 if name.startswith(("self_attn.o_proj", "mlp.down_proj")) else 0
    halves = 1 if "norm" in name else 2
    whole = weight(name, tuple(size * halves if index == axis else size for index, size in enumerate(shape)))
    return whole.narrow(axis, rank * shape[axis] if halves == 2 else 0, shape[axis])


def outputs(config: ModelConfig, layer: DecoderLayer, hidden: Tensor, reduce: Reduce) -> Tensor:
    cache = torch.zeros(1, N_TOKENS, 2, config.n_kv_heads, config.head_dim)
    layout = Layout.of([Slice(0, 0, N_TOKENS)], CPU)
    rotation = DecoderRope(config.head_dim, config.rope, torch.float32, CPU)(text_positions(0, N_TOKENS))
    return layer.forward(hidden, rotation, cache, layout, reduce)


@pytest.fixture
def hidden() -> Tensor:
    return torch.randn(N_TOKENS, CONFIG.hidden_size, generator=torch.Generator().manual_seed(0))


def test_two_ranks_with_half_of_the_weights_each_give_the_layer_of_one(hidden: Tensor) -> None:
    expected = outputs(CONFIG, DecoderLayer(CONFIG, Unquantized(weight, torch.float32)), hidden, alone)
    together = _Sum(2)

    def rank(index: int) -> Tensor:
        layer = DecoderLayer(HALF, Unquantized(lambda name, shape, _: part_of(index, name, shape), torch.float32))
        return outputs(HALF, layer, hidden, lambda partial: together.add(index, partial))

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(rank, range(2))
    assert torch.equal(first, second)
    assert torch.allclose(first, expected, atol=1e-5)
    assert together.sums == 2  # after the attention and after the MLP


class _Sum:
    """Adds up the partial sums of ranks that run in threads, in the order of the ranks."""

    def __init__(self, n_ranks: int) -> None:
        self.sums = 0
        self._partials: dict[int, Tensor] = {}
        self._total = torch.empty(0)
        self._all_here = threading.Barrier(n_ranks, self._add, timeout=20)

    def add(self, rank: int, partial: Tensor) -> Tensor:
        self._partials[rank] = partial
        self._all_here.wait()
        return self._total.clone()

    def _add(self) -> None:
        self.sums += 1
        self._total = self._partials[0] + self._partials[1]


def test_a_residual_is_added_after_the_sum_and_left_as_it_is(hidden: Tensor) -> None:
    before = hidden.clone()
    layer = DecoderLayer(CONFIG, Unquantized(weight, torch.float32))
    expected = outputs(CONFIG, layer, hidden, alone)
    assert torch.allclose(outputs(CONFIG, layer, hidden, lambda partial: partial), expected, atol=1e-6)
    assert torch.equal(hidden, before)
    twice = outputs(CONFIG, layer, hidden, lambda partial: partial * 0)
    assert torch.equal(twice, before)
