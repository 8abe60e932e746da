"""Products of packed weights: their numbers, and that a row's bits depend on nothing beside it."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mdi.core.group import InputShards
from mdi.core.quantization import FORMATS as NAMED
from mdi.core.quantization import INT4, INT4_MINIMUMS, INT8, INT8_32_MINIMUMS, Quantization, QuantizedTensor
from mdi.kernels import build
from mdi.kernels.library import Library, library
from mdi.kernels.packed import Kernels, PackedWeight, partial_products, product

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
EPSILON = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
WIDE_GROUPS = Quantization("int4 in groups of 128", 4, 128, 32)
WIDE_MINIMUMS = Quantization("int4 in groups of 128 with minimums", 4, 128, 32, minimums=True)
FORMATS = [*NAMED.values(), WIDE_GROUPS, WIDE_MINIMUMS]
SCALES = {8: torch.float32, 4: torch.float16}  # by bits
SHAPES = [(16, 1), (1, 7), (37, 29), (70, 96), (40, 300), (130, 513)]  # outputs, inputs
ROWS = 535  # more than are computed at once


SETS = ["scalar", "avx2", "avx2vnni", "avx512", "avx512bf16", "amx", "neon", "neonbf16"]
EMULATED = [pytest.param(("emulated", isa), marks=pytest.mark.slow) for isa in ("avx512bf16", "amx")]


@pytest.fixture(scope="module", params=[*SETS, *EMULATED], ids=str)
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    """Of every instruction set that this machine runs, those of AVX-512 and AMX also in plain C."""
    build.build()
    loaded = library()
    assert loaded is not None
    if isinstance(request.param, tuple):
        return Kernels.of(emulated(tmp_path_factory.mktemp("emulated"), request.param[1]))
    if not loaded.shared("cpu_runs", ctypes.c_char_p, result=ctypes.c_int)(request.param.encode()):
        pytest.skip("another processor's")
    return Kernels.of(replace(loaded, isa=request.param))


def emulated(folder: Path, isa: str, kernels: Sequence[str] = ("products.c", "pack.c")) -> Library:
    """A library of some kernels that is compiled with vectors of 16 floats, unsigned weights and pairs of bfloat16."""
    try:
        compiler = build.find_compiler(build.this_machine())
    except build.BuildError:
        pytest.skip("no compiler")
    sources = [str(build.SOURCES / name) for name in (*kernels, "pool.c", "memory.c")]
    named = [f"-DMDI_ISA={isa}", f"-DMDI_{isa.upper()}", "-DEMULATED_AVX512"]
    path = folder / "emulated.so"
    command = [*compiler, *build.FLAGS, "-O1", "-Wno-psabi", *named, "-shared", *sources, "-lm", "-o", str(path)]
    subprocess.run(command, check=True)
    return Library(isa, path, ctypes.CDLL(str(path)))


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


def quantized(format_: Quantization, outputs: int, inputs: int) -> QuantizedTensor:
    """Random values over their whole range, the smallest and the largest in every row."""
    groups = inputs // format_.group if format_.group else 1
    generator = torch.Generator().manual_seed(0)
    scales = (torch.rand(outputs, groups, generator=generator) + 0.1).to(SCALES[format_.bits])
    order = torch.randperm(inputs, generator=generator).int() if format_.ordered else None
    largest = 2 ** (format_.bits - 1)
    minimums = (largest * torch.randn(outputs, groups, generator=generator)).to(scales) if format_.minimums else None
    if format_.bits == 8:
        values = torch.randint(-128, 128, (outputs, inputs), dtype=torch.int8, generator=generator)
        values[:, :2] = torch.tensor([-128, 127])
        return QuantizedTensor(format_, values, scales, order=order, minimums=minimums)
    values = torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8, generator=generator)
    values[:, :32] = torch.tensor([0, 255]).repeat_interleave(16)
    zeros = torch.randint(0, 17, (outputs, groups), dtype=torch.uint8, generator=generator)  # 16: see quantized.py
    return QuantizedTensor(format_, values, scales, zeros if format_.zeros else None, order, minimums)


def dequantized(weight: QuantizedTensor) -> Tensor:
    """float64 [outputs, inputs], the inputs as they are stored."""
    outputs, inputs = weight.shape

    def of_inputs(numbers: Tensor) -> Tensor:
        return numbers.double().repeat_interleave(inputs // numbers.shape[1], 1)

    values = weight.values.double()
    if weight.quantization.bits == 4:
        values = torch.stack([weight.values & 15, weight.values >> 4], 2).view(outputs, inputs).double()
    if weight.minimums is not None:
        return values * of_inputs(weight.scales) + of_inputs(weight.minimums)
    if weight.quantization.bits == 4:
        values -= 8 if weight.zeros is None else of_inputs(weight.zeros)
    return values * of_inputs(weight.scales)


def sizes(weight: QuantizedTensor) -> Tensor:
    """Of what is added up for each number: with minimums that is more than the number, as they may take it away."""
    if weight.minimums is None:
        return dequantized(weight).abs()
    without = dequantized(replace(weight, minimums=torch.zeros_like(weight.minimums)))
    return without.abs() + (dequantized(weight) - without).abs()


def rounded(x: Tensor, group: int) -> Tensor:
    """Activations as int8 by row and group describes them, float64."""
    parts = x.float().view(len(x), -1, group)
    scales = parts.abs().amax(2, keepdim=True) / 127
    scales[scales < 2.0**-126] = 0  # a group of subnormal numbers counts as zeros
    steps = (parts * torch.where(scales > 0, 1 / scales, 0)).round()
    return (steps.double() * scales.double()).view(x.shape)


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
        by_tanh = functional.gelu(exact, approximate="tanh")
        near(product(packed, x, bias=bias, activation="tanh_gelu"), by_tanh, size, dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("format_", FORMATS)
def test_a_quantised_product_is_that_of_its_numbers(
    kernels: Kernels, format_: Quantization, dtype: torch.dtype
) -> None:
    weight = quantized(format_, 53, 384)
    packed, numbers = PackedWeight.pack(weight, kernels=kernels), dequantized(weight)
    bias, x = random(53), random(27, 384, dtype=dtype)
    x[3], x[4, :64], x[5] = 0, 0, torch.finfo(dtype).smallest_normal / 8
    x[6, ::2], x[6, 1::2] = 1, -1
    x_rounded = rounded(x if weight.order is None else x[:, weight.order], format_.activation_group)
    exact = functional.linear(x_rounded, numbers, bias.double())
    size = functional.linear(x_rounded.abs(), sizes(weight), bias.double().abs())
    for rows in (0, 1, 2, 5, 13, 27):
        near(product(packed, x[:rows], bias=bias), exact[:rows], size[:rows], dtype)


@pytest.mark.parametrize("format_", FORMATS)
def test_a_group_that_is_not_finite_gives_no_number(kernels: Kernels, format_: Quantization) -> None:
    packed, x = PackedWeight.pack(quantized(format_, 20, 384), kernels=kernels), random(9, 384)
    x[2, 5], x[4, 383], x[6, 100] = torch.nan, torch.inf, -torch.inf
    made = product(packed, x)
    assert made[[2, 4, 6]].isnan().all()
    assert made[[0, 1, 3, 5, 7, 8]].isfinite().all()


GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "tanh_gelu": partial(functional.gelu, approximate="tanh"),
}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("gate_kind", ["silu", "tanh_gelu"])
def test_a_gate_is_fused(kernels: Kernels, gate_kind: str, dtype: torch.dtype) -> None:
    for inner, inputs in [(1, 3), (8, 40), (75, 130)]:
        weight, x, bias = random(2 * inner, inputs, dtype=dtype), random(9, inputs, dtype=dtype), random(2 * inner)
        gate, up = functional.linear(x.double(), weight.double(), bias.double()).chunk(2, dim=1)
        exact = GATES[gate_kind](gate) * up
        made = product(PackedWeight.pack(weight, gate=gate_kind, kernels=kernels), x, bias=bias)
        assert (made.double() - exact).abs().max() <= (EPSILON[dtype] + 1e-5) * exact.abs().max()


@pytest.mark.parametrize("gate_kind", ["silu", "tanh_gelu"])
@pytest.mark.parametrize("format_", FORMATS)
def test_a_gate_of_a_quantised_weight(kernels: Kernels, format_: Quantization, gate_kind: str) -> None:
    """The product without a gate has been compared; with one it is fused with the same sums."""
    weight, x, bias = quantized(format_, 2 * 37, 384), random(9, 384), random(2 * 37)
    gate, up = product(PackedWeight.pack(weight, kernels=kernels), x, bias=bias).double().chunk(2, dim=1)
    exact = GATES[gate_kind](gate) * up
    made = product(PackedWeight.pack(weight, gate=gate_kind, kernels=kernels), x, bias=bias)
    assert (made.double() - exact).abs().max() <= 1e-5 * exact.abs().max()


@pytest.mark.parametrize("kind", [*FLOATS, *FORMATS])
@pytest.mark.parametrize("shards", [None, InputShards((0, 256, 768), 256)], ids=["whole", "shards"])
def test_a_row_has_the_same_bits_in_every_batch(
    kernels: Kernels, kind: torch.dtype | Quantization, shards: InputShards | None, set_threads: Callable[[int], None]
) -> None:
    dtype = torch.bfloat16 if isinstance(kind, Quantization) else kind
    weight = quantized(kind, 72, 768) if isinstance(kind, Quantization) else random(72, 768, dtype=kind)
    packed = PackedWeight.pack(weight, kernels=kernels)
    x, residual = random(ROWS, 768, dtype=dtype), random(ROWS, 72, dtype=dtype)
    whole = product(packed, x, residual=residual, shards=shards)
    several = [*range(1, 18), 64]
    parts = [slice(ROWS), *map(slice, several), *(slice(ROWS - rows, ROWS) for rows in several)]
    for n_threads in (1, 3):
        set_threads(n_threads)
        for part in parts:
            made = product(packed, x[part], residual=residual[part], shards=shards)
            assert torch.equal(made, whole[part]), (n_threads, part)


@pytest.mark.parametrize("kind", [*FLOATS, INT8, INT8_32_MINIMUMS, INT4, INT4_MINIMUMS])
@pytest.mark.parametrize("bounds", [(0, 128, 384), (0, 64, 192, 384)])
def test_shards_are_products_of_their_own_that_are_rounded_and_added_in_order(
    kernels: Kernels, kind: torch.dtype | Quantization, bounds: tuple[int, ...]
) -> None:
    dtype = torch.bfloat16 if isinstance(kind, Quantization) else kind
    weight = quantized(kind, 72, 384) if isinstance(kind, Quantization) else random(72, 384, dtype=kind)
    x, residual, shards = random(23, 384, dtype=dtype), random(23, 72, dtype=dtype), InputShards(bounds, 64)
    packed = PackedWeight.pack(weight, kernels=kernels)
    parts = [product(PackedWeight.pack(columns(weight, part), kernels=kernels), x[:, part]) for part in shards.slices]
    for rows in (1, 3, 23):
        sums = torch.empty(shards.count, rows, 72, dtype=dtype)
        partial_products(packed, x[:rows], shards, sums)
        assert torch.equal(sums, torch.stack(parts)[:, :rows])
        total = sums[0].float()
        for part in sums[1:]:
            total = total + part
        made = product(packed, x[:rows], residual=residual[:rows], shards=shards)
        assert torch.equal(made, (total + residual[:rows]).to(dtype))


def columns(weight: Tensor | QuantizedTensor, part: slice) -> Tensor | QuantizedTensor:
    """Some inputs of a weight, in whole groups."""
    if isinstance(weight, Tensor):
        return weight[:, part]
    per_byte, group = 8 // weight.quantization.bits, weight.quantization.group
    values = weight.values[:, part.start // per_byte : part.stop // per_byte]
    if group is None:
        return replace(weight, values=values)
    groups = slice(part.start // group, part.stop // group)
    minimums = None if weight.minimums is None else weight.minimums[:, groups]
    return replace(weight, values=values, scales=weight.scales[:, groups], minimums=minimums)


def test_shards_that_cut_a_group_are_refused(kernels: Kernels) -> None:
    packed = PackedWeight.pack(quantized(INT8, 40, 384), kernels=kernels)
    with pytest.raises(ValueError, match=r"shards that end at \(0, 96, 384\) cut groups of 64 inputs"):
        product(packed, random(9, 384), shards=InputShards((0, 96, 384), 96))


@pytest.mark.parametrize("places", [[-1, 1, 2], [384, 0, 1], []])
def test_an_order_of_other_inputs_is_refused(kernels: Kernels, places: list[int]) -> None:
    weight = quantized(NAMED["int4-ordered"], 20, 384)
    assert weight.order is not None
    order = torch.cat([torch.tensor(places, dtype=torch.int32), weight.order[3:]])
    with pytest.raises(ValueError, match="the order of its inputs is not of 384 inputs"):
        PackedWeight.pack(replace(weight, order=order), kernels=kernels)


@pytest.mark.parametrize("format_", [INT8, INT4])
def test_a_width_that_is_no_multiple_of_the_group_is_refused(kernels: Kernels, format_: Quantization) -> None:
    weight = quantized(format_, 4, 128)
    cut = replace(weight, values=weight.values[:, : 100 * format_.bits // 8])
    with pytest.raises(ValueError, match="its 100 inputs are no multiple of the group of"):
        PackedWeight.pack(cut, kernels=kernels)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("inputs", [33, 64])
def test_what_is_no_usual_number_stays_what_it_is(kernels: Kernels, dtype: torch.dtype, inputs: int) -> None:
    """Zeros, infinities, NaN and subnormal numbers in the activations; infinities in the weight."""
    tiny = torch.finfo(dtype).smallest_normal / 4
    weight = random(20, inputs, dtype=dtype)
    weight[3, 7] = torch.inf
    x = random(8, inputs, dtype=dtype)
    x[0], x[1, 5], x[2, 6], x[3] = 0, torch.inf, torch.nan, tiny
    packed = PackedWeight.pack(weight, kernels=kernels)
    made, exact = product(packed, x), functional.linear(x.double(), weight.double())
    if dtype == torch.bfloat16 and made[3, 3].isnan():  # x86's products of pairs take them as 0
        made[3, 3] = exact[3, 3]
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


@pytest.mark.parametrize("format_", [INT8_32_MINIMUMS, INT4_MINIMUMS])
def test_a_minimum_that_is_nan_is_refused(kernels: Kernels, format_: Quantization) -> None:
    weight = quantized(format_, 20, 384)
    assert weight.minimums is not None
    weight.minimums[19, -1] = torch.nan
    with pytest.raises(ValueError, match="it has numbers that are NaN"):
        PackedWeight.pack(weight, kernels=kernels)


@pytest.mark.parametrize("format_", FORMATS)
def test_a_scale_that_is_nan_is_refused(kernels: Kernels, format_: Quantization) -> None:
    weight = quantized(format_, 20, 384)
    weight.scales[19, -1] = torch.nan
    with pytest.raises(ValueError, match="it has numbers that are NaN"):
        PackedWeight.pack(weight, kernels=kernels)
