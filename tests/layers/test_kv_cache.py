"""The KV cache: copies of prefixes, and memory that comes as rows are written and goes when they are released."""

from __future__ import annotations

import mmap
from typing import Any

import psutil
import pytest
import torch

from mdi.core.batch import Copy, Release
from mdi.core.errors import ConfigError
from mdi.layers.kv_cache import KVCache

MB = 1e6


def a_cache(n_slots: int = 3, sequence_length: int = 256, **sizes: Any) -> KVCache:
    shape = {"n_layers": 2, "n_kv_heads": 2, "head_dim": 8} | sizes
    return KVCache(
        n_slots=n_slots,
        sequence_length=sequence_length,
        dtype=torch.float32,
        device=torch.device("cpu"),
        **shape,
    )


def resident_mb() -> float:
    return float(psutil.Process().memory_info().rss) / MB


def test_a_prefix_is_copied_in_every_layer_and_nothing_else() -> None:
    cache = a_cache()
    for number, layer in enumerate(cache.layers):
        layer[:] = torch.arange(layer.numel()).view_as(layer) + number
    before = [layer.clone() for layer in cache.layers]
    cache.apply(Copy(source=0, target=2, length=130))
    for layer, old in zip(cache.layers, before, strict=True):
        assert torch.equal(layer[:2], old[:2])
        assert torch.equal(layer[2, :130], old[0, :130])


@pytest.mark.parametrize("kept", [0, 1, 37, 255, 256])
def test_a_release_keeps_the_first_rows_of_its_slot_and_all_other_slots(kept: int) -> None:
    cache = a_cache(n_kv_heads=1, head_dim=3)  # rows of 24 bytes: slots share pages with one another
    for layer in cache.layers:
        layer[:] = torch.arange(layer.numel()).view_as(layer) + 1
    before = [layer.clone() for layer in cache.layers]
    cache.apply(Release(slot=1, kept=kept))
    for layer, old in zip(cache.layers, before, strict=True):
        assert torch.equal(layer[0], old[0])
        assert torch.equal(layer[1, :kept], old[1, :kept])
        assert torch.equal(layer[2], old[2])
        assert layer.isfinite().all()


@pytest.mark.skipif(not hasattr(mmap, "MADV_NOHUGEPAGE"), reason="other systems count and release memory otherwise")
def test_memory_comes_with_what_is_written_and_goes_with_what_is_released() -> None:
    before = resident_mb()
    cache = a_cache(n_slots=16, sequence_length=32_768, n_layers=4, head_dim=64)  # 2.1 GB, if all were written
    assert resident_mb() < before + 8
    for layer in cache.layers:
        layer[5, :20_000] = 1  # 82 MB
    full = resident_mb()
    assert full > before + 78
    cache.apply(Release(slot=5, kept=10_000))
    assert full - 45 < resident_mb() < full - 37
    cache.apply(Release(slot=5, kept=0))
    assert resident_mb() < before + 8


def test_a_cache_that_the_system_refuses_is_an_error_with_its_remedy() -> None:
    with pytest.raises(ConfigError, match=r"refuses .* GB for one layer's KV cache.*--max-sequences"):
        a_cache(n_slots=2**20, sequence_length=2**20)
