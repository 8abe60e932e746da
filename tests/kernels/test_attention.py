"""Attention by kernels: the numbers of float64, and for each row the same bits in every batch."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from mdi.kernels import attention, build
from mdi.kernels.library import library
from tests.kernels.test_products import SETS, emulated

Run = tuple[int, int, int, int]  # first row, slot, position, rows

DTYPES = {torch.float32: 1e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4}
SHAPES = [(6, 2, 32), (14, 2, 64), (12, 2, 128), (9, 3, 8), (3, 1, 20), (4, 4, 80), (1, 1, 1), (200, 1, 4)]


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    build.build()


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    made: torch.dtype = request.param
    return made


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    found = library()
    assert found is not None
    kernel, before = found.shared("set_threads", ctypes.c_int), found.shared("threads", result=ctypes.c_int)()
    yield kernel
    kernel(before)


def attend(queries: Tensor, cache: Tensor, runs: Sequence[Run], window: int = 0) -> Tensor:
    return attention.attend(queries, cache, torch.tensor(runs), window=window)


def exactly(queries: Tensor, cache: Tensor, runs: Sequence[Run], window: int = 0) -> Tensor:
    """In float64, row by row."""
    group, out = queries.shape[1] // cache.shape[3], []
    for row, slot, start, length in runs:
        for index in range(length):
            end = start + index + 1
            seen = cache[slot, max(0, end - window) if window else 0 : end]
            keys, values = seen.double().repeat_interleave(group, 2).unbind(1)
            scores = torch.einsum("hd,khd->hk", queries[row + index].double(), keys) / queries.shape[2] ** 0.5
            out.append(torch.einsum("hk,khd->hd", scores.softmax(-1), values).flatten())
    return torch.stack(out)


def made(shape: tuple[int, int, int], runs: Sequence[Run], dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Queries, and a cache that is NaN wherever no run may read."""
    heads, kv_heads, head_dim = shape
    generator = torch.Generator().manual_seed(seed)
    ends = {slot: start + length for _, slot, start, length in runs}
    cache = torch.full((max(ends) + 1, max(ends.values()) + 3, 2, kv_heads, head_dim), torch.nan, dtype=dtype)
    for slot, end in ends.items():
        cache[slot, :end] = torch.randn(end, 2, kv_heads, head_dim, generator=generator).to(dtype)
    rows = sum(length for *_, length in runs)
    return torch.randn(rows, heads, head_dim, generator=generator).to(dtype), cache


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_is_that_of_float64(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    runs = [(0, 2, 0, 1), (1, 0, 700, 3), (4, 3, 0, 70), (74, 4, 63, 1), (75, 5, 64, 1), (76, 6, 500, 40)]
    queries, cache = made(shape, runs, dtype)
    exact = exactly(queries, cache, runs)
    assert (attend(queries, cache, runs).double() - exact).norm() < DTYPES[dtype] * exact.norm()


CUTS = [0, 1, 3, 12, 13, 21, 76, 139, 140, 200]


def test_a_row_has_the_same_bits_in_every_batch(dtype: torch.dtype, set_threads: Callable[[int], None]) -> None:
    """In any part of a prompt, beside any others, on any number of threads, in any partition of the keys."""
    for shape in SHAPES[:5]:
        for start in (0, 60, 450, 1400):
            queries, cache = made(shape, [(0, 1, start, 200), (200, 0, 520, 9)], dtype)
            set_threads(1)
            whole = attend(queries[:200], cache, [(0, 1, start, 200)])
            for n_threads in (1, 2, 3):
                set_threads(n_threads)
                parts = [(first, 1, start + first, last - first) for first, last in pairwise(CUTS)]
                assert torch.equal(attend(queries, cache, [*parts, (200, 0, 520, 9)])[:200], whole)
                alone = [attend(queries[row : row + 1], cache, [(0, 1, start + row, 1)]) for row in range(190, 200)]
                assert torch.equal(torch.cat(alone), whole[190:])


WINDOWS = [1, 5, 64, 70, 512, 700, 5000]


@pytest.mark.parametrize("window", WINDOWS)
def test_a_window_hides_older_keys_and_keeps_the_bits(
    dtype: torch.dtype, window: int, set_threads: Callable[[int], None]
) -> None:
    for shape in [(6, 2, 32), (9, 3, 20), (4, 4, 80)]:
        for start in (0, 450, 1400):
            run = (0, 1, start, 200)
            queries, cache = made(shape, [run], dtype)
            set_threads(1)
            whole, exact = attend(queries, cache, [run], window), exactly(queries, cache, [run], window)
            assert (whole.double() - exact).norm() < DTYPES[dtype] * exact.norm()
            for n_threads in (1, 3):
                set_threads(n_threads)
                parts = [(first, 1, start + first, last - first) for first, last in pairwise(CUTS)]
                assert torch.equal(attend(queries, cache, parts, window), whole)
                alone = [attend(queries[row : row + 1], cache, [(0, 1, start + row, 1)], window) for row in (0, 199)]
                assert torch.equal(torch.cat(alone), whole[[0, 199]])


EMULATED = pytest.param(("emulated", "avx512bf16"), marks=pytest.mark.slow)


@pytest.fixture(scope="module", params=[*SETS, EMULATED], ids=str)
def any_kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> attention.Kernels:
    """Of every instruction set that this machine runs, and of AVX-512 in plain C."""
    found = library()
    assert found is not None
    if isinstance(request.param, tuple):
        sources = ("attention.c", "rotary.c", "norms.c")
        found = emulated(tmp_path_factory.mktemp("emulated"), request.param[1], sources)
    elif found.shared("cpu_runs", ctypes.c_char_p, result=ctypes.c_int)(request.param.encode()):
        found = replace(found, isa=request.param)
    else:
        pytest.skip("another processor's")
    return attention.Kernels.of(found)


@pytest.fixture
def _any_set(any_kernels: attention.Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "kernels", lambda: any_kernels)


@pytest.mark.usefixtures("_any_set")
def test_every_instruction_set_computes_it(dtype: torch.dtype) -> None:
    for shape in [(12, 2, 128), (7, 1, 64), (3, 1, 20), (4, 4, 80)]:
        queries, cache = made(shape, [(0, 0, 500, 40)], dtype)
        whole, exact = attend(queries, cache, [(0, 0, 500, 40)]), exactly(queries, cache, [(0, 0, 500, 40)])
        assert (whole.double() - exact).norm() < DTYPES[dtype] * exact.norm()
        for first, last in [(3, 4), (10, 13), (11, 40)]:
            assert torch.equal(
                attend(queries[first:last], cache, [(0, 0, 500 + first, last - first)]), whole[first:last]
            )


@pytest.mark.usefixtures("_any_set")
def test_every_instruction_set_reads_int8(dtype: torch.dtype) -> None:
    queries, _ = made((12, 2, 128), [(0, 0, 540, 9)], dtype)
    generator = torch.Generator().manual_seed(2)
    cache = torch.randint(-127, 128, (1, 549, 2, 2, 128), dtype=torch.int8, generator=generator)
    scales = torch.rand(1, 549, 2, 2, generator=generator) / 64
    whole = attention.attend(queries, cache, torch.tensor([(0, 0, 540, 9)]), scales)
    exact = exactly(queries, cache * scales[..., None].double(), [(0, 0, 540, 9)])
    assert (whole.double() - exact).norm() < DTYPES[dtype] * exact.norm()
    assert torch.equal(attention.attend(queries[4:5], cache, torch.tensor([(0, 0, 544, 1)]), scales), whole[4:5])


@pytest.mark.usefixtures("_any_set")
def test_every_instruction_set_attends_fully(dtype: torch.dtype) -> None:
    """In a vision tower every row to all of its frame, whichever rows are computed at once."""
    qkv = torch.randn(150, 3, 2, 80, generator=torch.Generator().manual_seed(0)).to(dtype)
    out = torch.empty(75, 160, dtype=dtype)
    attention.attend_fully(qkv, slice(75, 150), 75, out)
    queries, keys, values = qkv[75:].double().permute(1, 2, 0, 3)
    exact = ((queries @ keys.mT / 80**0.5).softmax(-1) @ values).transpose(0, 1).flatten(1)
    assert (out.double() - exact).norm() < DTYPES[dtype] * exact.norm()
    few = torch.empty(7, 160, dtype=dtype)
    attention.attend_fully(qkv, slice(80, 87), 75, few)
    assert torch.equal(few, out[5:12])


def test_rows_of_a_strided_batch_are_read_in_place() -> None:
    queries, cache = made((6, 2, 32), [(0, 0, 100, 5)], torch.float32)
    wide = torch.cat((queries, torch.full((5, 4, 32), torch.nan)), dim=1)
    assert torch.equal(attend(wide[:, :6], cache, [(0, 0, 100, 5)]), attend(queries, cache, [(0, 0, 100, 5)]))


def test_numbers_that_are_infinite_or_none_reach_the_output() -> None:
    """Stages look for them there, and give up the sequence that has them."""
    for place, number in [
        ((0, 7, 0), torch.nan),
        ((0, 7, 0), torch.inf),
        ((0, 7, 1), torch.nan),
        ((0, 7, 1), -torch.inf),
    ]:
        queries, cache = made((6, 2, 32), [(0, 0, 100, 5)], torch.float32)
        cache[(*place, 0, 3)] = number
        out = attend(queries, cache, [(0, 0, 100, 5)])
        assert not out[:, : 3 * 32].isfinite().all(1).any()
        assert out[:, 3 * 32 :].isfinite().all()


def test_an_int8_cache_is_its_dequantised_one(dtype: torch.dtype) -> None:
    runs = [(0, 0, 0, 1), (1, 2, 700, 3), (4, 1, 0, 70)]
    queries, _ = made((12, 2, 128), runs, dtype)
    generator = torch.Generator().manual_seed(2)
    cache = torch.randint(-127, 128, (3, 710, 2, 2, 128), dtype=torch.int8, generator=generator)
    scales = torch.rand(3, 710, 2, 2, generator=generator) / 64
    out = attention.attend(queries, cache, torch.tensor(runs), scales)
    exact = exactly(queries, cache * scales[..., None].double(), runs)
    assert (out.double() - exact).norm() < DTYPES[dtype] * exact.norm()
    one = attention.attend(queries[3:4], cache, torch.tensor([(0, 2, 702, 1)]), scales)
    assert torch.equal(one, out[3:4])


def test_keys_and_values_are_rounded_to_int8_by_token_and_head() -> None:
    qkv = torch.randn(3, 4 + 2 * 2, 16, generator=torch.Generator().manual_seed(0))
    qkv[1, 6] = 0
    given, cos, sin = qkv.clone(), torch.ones(3, 8), torch.zeros(3, 8)
    cache, scales = torch.ones(1, 5, 2, 2, 16, dtype=torch.int8), torch.ones(1, 5, 2, 2)
    attention.rotate(qkv, cos, sin, torch.tensor([(0, 0, 1, 3)]), cache, scales, n_kv_heads=2)
    written, stored = given[:, 4:].view(3, 2, 2, 16), cache[0, 1:4] * scales[0, 1:4, ..., None]
    assert torch.allclose(scales[0, 1:4], written.abs().amax(-1) / 127, rtol=1e-6)
    assert ((written - stored).abs() <= 0.5001 * scales[0, 1:4, ..., None]).all()
    assert torch.equal(qkv[:, :4], given[:, :4])
    assert (cache[0, [0, 4]] == 1).all()
    qkv[2, 5, 3] = torch.inf
    attention.rotate(qkv, cos, sin, torch.tensor([(0, 0, 1, 3)]), cache, scales, n_kv_heads=2)
    assert scales[0, 3, 0, 1].isnan()  # reaches the output, where stages look for it
