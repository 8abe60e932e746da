"""Attention by kernels and by torch: the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mdi.core.batch import Slice
from mdi.kernels import attention as kernels
from mdi.kernels import build
from mdi.layers import attention
from mdi.layers.attention import Layout, attend, attend_fully, rotate, rotate_in_place
from mdi.layers.rope import DecoderRope, RopeConfig, Rotation, text_positions

CPU = torch.device("cpu")
SLICES = (Slice(2, 0, 7), Slice(0, 30, 1), Slice(1, 20, 5))


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    build.build()


@pytest.fixture(params=["kernels", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(kernels, "works_on", lambda device: False)
    return str(request.param)


def rotation_of(n_rows: int, head_dim: int) -> Rotation:
    return DecoderRope(head_dim, RopeConfig("default", 1e4), CPU)(text_positions(3, n_rows))


@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize("tokens", [4, 100, 514])
@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 0.005), (torch.float32, 1e-5)])
def test_full_attention_is_within_each_frame(
    tokens: int, frames: int, dtype: torch.dtype, error: float, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "SCORES_AT_ONCE", 2**14)
    qkv = torch.randn(tokens, 3, 6, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    framed = qkv.double().view(frames, tokens // frames, 3, 6, 16).permute(2, 0, 3, 1, 4)
    exact = functional.scaled_dot_product_attention(*framed).transpose(1, 2).reshape(tokens, 96)
    out = torch.empty(tokens, 96, dtype=dtype)
    for _ in attend_fully(qkv, [tokens // frames] * frames, out):
        pass
    assert (out.double() - exact).norm() < error * exact.norm()


def batch() -> tuple[Tensor, Tensor]:
    """Queries, keys and values of SLICES, and a cache with what came before them."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(13, 10, 16, generator=generator), torch.randn(3, 40, 2, 2, 16, generator=generator)


def test_a_batch_is_rotated_written_and_attended_to_in_its_slots(way: str) -> None:
    qkv, cache = batch()
    layout, rotation, before = Layout.of(SLICES, CPU), rotation_of(13, 16), cache.clone()
    rotated = rotation(qkv[:, :8])
    queries = rotate(qkv.clone(), rotation, cache, layout)
    assert torch.allclose(queries, rotated[:, :6], atol=1e-6)
    row = 0
    for part in SLICES:
        rows = slice(row, row + part.length)
        assert torch.allclose(cache[part.slot, part.start : part.end, 0], rotated[rows, 6:], atol=1e-6)
        assert torch.equal(cache[part.slot, part.start : part.end, 1], qkv[rows, 8:])
        cache[part.slot, part.start : part.end] = before[part.slot, part.start : part.end]
        row += part.length
    assert torch.equal(cache, before)  # nothing else was written


@pytest.mark.parametrize("window", [0, 1, 3, 100])
def test_kernels_and_torch_attend_alike(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    qkv, cache = batch()
    by_kernels = attend(qkv[:, :6], cache, Layout.of(SLICES, CPU), window=window)
    monkeypatch.setattr(kernels, "works_on", lambda device: False)
    by_torch = attend(qkv[:, :6], cache, Layout.of(SLICES, CPU), window=window)
    assert torch.allclose(by_torch, by_kernels, atol=1e-5)


def test_layers_may_write_what_is_not_rotated(way: str) -> None:
    qkv, cache = batch()
    queries = rotate(qkv.clone(), None, cache, Layout.of(SLICES, CPU))
    assert torch.equal(queries, qkv[:, :6])
    assert torch.equal(cache[SLICES[0].slot, SLICES[0].start, 0], qkv[0, 6:8])


def test_kernels_and_torch_keep_the_same_int8_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    layout, rotation, made = Layout.of(SLICES, CPU), rotation_of(13, 16), []
    for by_torch in (False, True):
        if by_torch:
            monkeypatch.setattr(kernels, "works_on", lambda device: False)
            layout = Layout.of(SLICES, CPU)
        qkv, _ = batch()
        cache, scales = torch.ones(3, 40, 2, 2, 16, dtype=torch.int8), torch.full((3, 40, 2, 2), 0.01)
        queries = rotate(qkv, rotation, cache, layout, scales=scales)
        made.append((cache.float(), scales, attend(queries, cache, layout, scales)))
    for by_kernels, by_torch in zip(*made, strict=True):
        assert torch.allclose(by_kernels, by_torch, atol=1e-4)


def test_patches_are_rotated_in_place(way: str) -> None:
    qkv = torch.randn(5, 3, 4, 16)
    rotated = rotation_of(5, 16)(qkv[:, :2].flatten(1, 2)).view(5, 2, 4, 16)
    expected = torch.cat((rotated, qkv[:, 2:]), dim=1)
    rotate_in_place(qkv, rotation_of(5, 16))
    assert torch.allclose(qkv, expected, atol=1e-6)
