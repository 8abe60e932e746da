"""Products of packed weights: their numbers, and that a row's bits depend on nothing beside it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mdi.kernels import build
from mdi.kernels.library import library
from mdi.kernels.packed import Kernels, PackedWeight, product

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
EPSILON = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SHAPES = [(16, 1), (1, 7), (37, 29), (40, 300), (130, 513)]  # outputs, inputs
ROWS = 523


@pytest.fixture(scope="module", params=["scalar", "avx2", "avx2vnni", "avx512", "amx", "neon"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    """Of every instruction set that this machine runs."""
    build.build()
    loaded = library()
    assert loaded is not None
    if not loaded.shared("cpu_runs", ctypes.c_char_p, result=ctypes.c_int)(request.param.encode()):
        pytest.skip("another processor's")
    return Kernels.of(replace(loaded, isa=request.param))


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    loaded = library()
    assert loaded is not None
    set_threads = loaded.shared("set_threads", ctypes.c_int)
    before = loaded.shared("threads", result=ctypes.c_int)()
    yield set_threads
    set_threads(before)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def near(made: Tensor, exact: Tensor, size: Tensor, dtype: torch.dtype) -> None:
    """size: of what was added up, so that a sum near zero may be as wrong as its parts."""
    assert made.dtype == dtype
    wrong = (made.double() - exact).abs()
    allowed = EPSILON[dtype] * exact.abs() + 2.0**-20 * size + 1e-30
    assert (wrong <= allowed).all(), f"{(wrong / allowed).max()} times what rounding allows"


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_product_is_that_of_float64(kernels: Kernels, shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight, bias = random(*shape, dtype=dtype), random(shape[0], seed=1)
    packed = PackedWeight.pack(weight, kernels=kernels)
    for rows in (0, 1, 2, 5, 13, 27):
        x, residual = random(rows, shape[1], dtype=dtype, seed=2), random(rows, shape[0], dtype=dtype, seed=3)
        exact = functional.linear(x.double(), weight.double(), bias.double())
        size = functional.linear(x.double().abs(), weight.double().abs(), bias.double().abs())
        near(product(packed, x, bias=bias), exact, size, dtype)
        added, its_size = exact + residual.double(), size + residual.double().abs()
        near(product(packed, x, bias=bias, residual=residual), added, its_size, dtype)
        gelu = functional.gelu(exact)
        near(product(packed, x, bias=bias, activation="gelu"), gelu, size, dtype)
        quick = exact * torch.sigmoid(1.702 * exact)
        near(product(packed, x, bias=bias, activation="quick_gelu"), quick, size, dtype)


@pytest.mark.parametrize("dtype", FLOATS)
def test_swiglu_is_fused(kernels: Kernels, dtype: torch.dtype) -> None:
    for inner, inputs in [(1, 3), (8, 40), (75, 130)]:
        weight, x, bias = random(2 * inner, inputs, dtype=dtype), random(9, inputs, dtype=dtype), random(2 * inner)
        gate, up = functional.linear(x.double(), weight.double(), bias.double()).chunk(2, dim=1)
        exact = functional.silu(gate) * up
        made = product(PackedWeight.pack(weight, swiglu=True, kernels=kernels), x, bias=bias)
        assert (made.double() - exact).abs().max() <= (EPSILON[dtype] + 1e-5) * exact.abs().max()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shards", [1, 2])
def test_a_row_has_the_same_bits_in_every_batch(
    kernels: Kernels, dtype: torch.dtype, shards: int, set_threads: Callable[[int], None]
) -> None:
    packed = PackedWeight.pack(random(72, 600, dtype=dtype), kernels=kernels)
    x, residual = random(ROWS, 600, dtype=dtype), random(ROWS, 72, dtype=dtype)
    whole = product(packed, x, residual=residual, shards=shards)
    for n_threads in (1, 2, 3):
        set_threads(n_threads)
        for rows in [*range(1, 18), 64, ROWS]:
            for part in (slice(rows), slice(ROWS - rows, ROWS)):
                made = product(packed, x[part], residual=residual[part], shards=shards)
                assert torch.equal(made, whole[part]), (n_threads, rows)


@pytest.mark.parametrize("dtype", FLOATS)
def test_shards_are_products_of_their_own_that_are_added_in_order(kernels: Kernels, dtype: torch.dtype) -> None:
    weight, x = random(40, 96, dtype=dtype), random(9, 96, dtype=dtype).float()
    whole = product(PackedWeight.pack(weight, kernels=kernels), x, shards=3)
    parts = [
        product(PackedWeight.pack(weight[:, begin : begin + 32], kernels=kernels), x[:, begin : begin + 32])
        for begin in (0, 32, 64)
    ]
    assert torch.equal(whole, parts[0] + parts[1] + parts[2])


@pytest.mark.parametrize("dtype", FLOATS)
def test_what_is_no_usual_number_stays_what_it_is(kernels: Kernels, dtype: torch.dtype) -> None:
    """Zeros, infinities, NaN and subnormal numbers in the activations; infinities in the weight."""
    tiny = torch.finfo(dtype).smallest_normal / 4
    weight = random(20, 33, dtype=dtype)
    weight[3, 7] = torch.inf
    x = random(8, 33, dtype=dtype)
    x[0], x[1, 5], x[2, 6], x[3] = 0, torch.inf, torch.nan, tiny
    packed = PackedWeight.pack(weight, kernels=kernels)
    made, exact = product(packed, x), functional.linear(x.double(), weight.double())
    assert torch.equal(made.isnan(), exact.isnan())
    assert torch.equal(made.isinf(), exact.isinf())
    finite = exact.isfinite()
    assert torch.allclose(made[finite].double(), exact[finite], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_weight_with_nan_is_refused(kernels: Kernels, dtype: torch.dtype) -> None:
    weight = random(20, 33, dtype=dtype)
    weight[19, 32] = torch.nan
    with pytest.raises(ValueError, match="it has numbers that are NaN"):
        PackedWeight.pack(weight, kernels=kernels)
