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
from mdi.core.dtypes import parse_dtype
from mdi.core.reduce import Reduce, alone
from mdi.core.tensors import Unquantized
from mdi.layers.attention import Layout
from mdi.layers.kv_cache import KVCache
from mdi.layers.rope import DecoderRope, text_positions
from mdi.models.config import ExpertsConfig, ModelConfig, StageSpec
from mdi.models.decoder import Decoder, DecoderLayer
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
    rotation = DecoderRope(config.head_dim, config.rope, CPU)(text_positions(0, N_TOKENS))
    return layer.forward(hidden, rotation, cache, layout, reduce)


@pytest.fixture
def hidden() -> Tensor:
    return torch.randn(N_TOKENS, CONFIG.hidden_size, generator=torch.Generator().manual_seed(0))


def test_two_ranks_with_half_of_the_weights_each_give_the_layer_of_one(hidden: Tensor) -> None:
    expected = outputs(CONFIG, DecoderLayer(CONFIG, 0, Unquantized(weight, torch.float32)), hidden, alone)
    together = _Sum(2)

    def rank(index: int) -> Tensor:
        layer = DecoderLayer(HALF, 0, Unquantized(lambda name, shape, _: part_of(index, name, shape), torch.float32))
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
    layer = DecoderLayer(CONFIG, 0, Unquantized(weight, torch.float32))
    expected = outputs(CONFIG, layer, hidden, alone)
    assert torch.allclose(outputs(CONFIG, layer, hidden, lambda partial: partial), expected, atol=1e-6)
    assert torch.equal(hidden, before)
    twice = outputs(CONFIG, layer, hidden, lambda partial: partial * 0)
    assert torch.equal(twice, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("shards", "cache_dtype"), [(1, None), (4, torch.int8)])
@pytest.mark.parametrize(
    ("qkv_bias", "qk_norm", "norm_dtype", "experts"),
    [
        (True, False, None, None),
        (False, True, "float32", None),
        (False, True, None, ExpertsConfig(9, 4, 32, True, (0, 1))),
        (False, True, None, ExpertsConfig(9, 4, 96, False, (1,))),
    ],
)
def test_one_native_call_has_the_bits_of_one_call_a_kernel(
    qkv_bias: bool,
    qk_norm: bool,
    norm_dtype: str | None,
    experts: ExpertsConfig | None,
    dtype: torch.dtype,
    shards: int,
    cache_dtype: torch.dtype | None,
) -> None:
    def get(name: str, shape: tuple[int, ...], own: str | None = None) -> Tensor:
        return weight(name, shape).to(parse_dtype(own) if own else dtype)

    config = replace(CONFIG, n_layers=2, qkv_bias=qkv_bias, qk_norm=qk_norm, norm_dtype=norm_dtype, experts=experts)
    decoder = Decoder(config, StageSpec(0, 2), None, Unquantized(get, dtype), tied_head=False)
    assert decoder._native is not None
    generator = torch.Generator().manual_seed(0)
    slices = [Slice(1, 0, 5), Slice(0, 600, 1), Slice(2, 10, 3)]
    hidden = torch.randn(9, config.hidden_size, generator=generator).to(dtype)
    sizes = {"n_layers": 2, "n_slots": 3, "n_kv_heads": config.n_kv_heads, "head_dim": config.head_dim}
    one, other = (KVCache(sequence_length=640, dtype=cache_dtype or dtype, device=CPU, **sizes) for _ in range(2))
    rotation = DecoderRope(config.head_dim, config.rope, CPU)(text_positions(0, 9))
    layout = Layout.of(slices, CPU)
    together = decoder.forward(hidden, rotation, one, layout, shards=shards)
    decoder._native = None
    assert torch.equal(decoder.forward(hidden, rotation, other, layout, shards=shards), together)
    assert all(map(torch.equal, one.layers + one.scales, other.layers + other.scales))
