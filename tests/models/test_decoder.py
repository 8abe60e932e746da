"""A stage's layers in one native call are the layers called kernel by kernel, and their variants are fields."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from testing.checkpoints import tiny_text_config
from torch import Tensor

from mdi.core.batch import Slice
from mdi.core.dtypes import parse_dtype
from mdi.core.group import Rank
from mdi.core.tensors import Unquantized
from mdi.layers.attention import Layout
from mdi.layers.kv_cache import KVCache
from mdi.layers.rope import DecoderRope, RopeConfig, text_positions
from mdi.models.config import ExpertsConfig, LayerKind, StageSpec
from mdi.models.decoder import Decoder
from mdi.models.registry import read_config
from mdi.models.shards import Shards

CPU = torch.device("cpu")
CONFIG = read_config(tiny_text_config())
GEMMA: dict[str, Any] = {
    "qk_norm": True,
    "activation": "geglu",
    "norm_offset": 0.5,
    "post_norms": True,
    "query_scale": 0.7,
    "kinds": (LayerKind(window=3, rope=RopeConfig("default", 100.0)), LayerKind()),
}
"""The variants of Gemma 3."""


def weight(name: str, shape: tuple[int, ...], _dtype: str | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    return torch.randn(shape, generator=generator) / 8 + ("norm" in name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("shards", "cache_dtype"), [(1, None), (4, torch.int8)])
@pytest.mark.parametrize(
    "variant",
    [
        {"qkv_bias": True},
        {"qk_norm": True, "norm_dtype": "float32"},
        {"qk_norm": True, "experts": ExpertsConfig(9, 4, 32, True, (0, 1))},
        {"qk_norm": True, "experts": ExpertsConfig(9, 4, 96, False, (1,))},
        GEMMA,
        GEMMA | {"experts": ExpertsConfig(9, 4, 32, True, (1,))},
    ],
    ids=["biases", "norms", "experts", "some experts", "gemma", "gemma with experts"],
)
def test_one_native_call_has_the_bits_of_one_call_a_kernel(
    variant: dict[str, Any],
    dtype: torch.dtype,
    shards: int,
    cache_dtype: torch.dtype | None,
) -> None:
    def get(name: str, shape: tuple[int, ...], own: str | None = None) -> Tensor:
        return weight(name, shape).to(parse_dtype(own) if own else dtype)

    config = replace(CONFIG, n_layers=2, **{"qkv_bias": False, **variant})
    decoder = Decoder(config, StageSpec(0, 2), None, Unquantized(get, dtype), tied_head=False)
    assert decoder._native is not None
    generator = torch.Generator().manual_seed(0)
    slices = [Slice(1, 0, 5), Slice(0, 600, 1), Slice(2, 10, 3)]
    hidden = torch.randn(9, config.hidden_size, generator=generator).to(dtype)
    sizes = {"n_layers": 2, "n_slots": 3, "n_kv_heads": config.n_kv_heads, "head_dim": config.head_dim}
    one, other = (KVCache(sequence_length=640, dtype=cache_dtype or dtype, device=CPU, **sizes) for _ in range(2))
    rotations = [DecoderRope(config.head_dim, rope, CPU)(text_positions(0, 9)) for rope in config.ropes]
    layout = Layout.of(slices, CPU)
    cut = Shards.of(config, shards).of_layers(config, Rank(0, shards, shards)) if shards > 1 else None
    together = decoder.forward(hidden, rotations, one, layout, shards=cut)
    decoder._native = None
    assert torch.equal(decoder.forward(hidden, rotations, other, layout, shards=cut), together)
    assert all(map(torch.equal, one.layers + one.scales, other.layers + other.scales))
