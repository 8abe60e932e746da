"""A product gives the same numbers whatever its layout."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mdi.core.errors import CheckpointError
from mdi.core.quantization import (
    FORMATS,
    INT4,
    INT4_MINIMUMS,
    INT8,
    INT8_32_MINIMUMS,
    Quantization,
    QuantizedTensor,
)
from mdi.core.tensors import Unquantized
from mdi.kernels.library import library
from mdi.layers import linear
from mdi.layers.linear import Linear, PackedLinear
from mdi.layers.quantize import dequantize, quantize

WEIGHTS = {
    "q.weight": (24, 40),
    "q.bias": (24,),
    "k.weight": (8, 40),
    "k.bias": (8,),
    "kernel.weight": (16, 5, 2, 4),
}


def tensors(dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in WEIGHTS.items()}


def load(
    loaded: dict[str, Tensor], outputs: dict[str, int], *inputs: int, bias: bool = False, activation: str = "none"
) -> Linear:
    def get(name: str, shape: tuple[int, ...], _dtype: str | None = None) -> Tensor:
        assert loaded[name].shape == shape
        return loaded[name]

    return Linear.load(Unquantized(get, loaded["q.weight"].dtype), outputs, *inputs, bias=bias, activation=activation)


DTYPES = [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)]


@pytest.mark.parametrize(("dtype", "error"), DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 100])
@pytest.mark.parametrize("bias", [True, False])
def test_weights_that_are_loaded_together_are_one_product(
    dtype: torch.dtype, error: float, rows: int, bias: bool
) -> None:
    loaded = tensors(dtype)
    product = load(loaded, {"q": 24, "k": 8}, 40, bias=bias)
    x, residual = torch.randn(rows, 40).to(dtype), torch.randn(rows, 32).to(dtype)
    before = residual.clone()
    parts = [
        functional.linear(
            x.double(), loaded[f"{name}.weight"].double(), loaded[f"{name}.bias"].double() if bias else None
        )
        for name in "qk"
    ]
    exact = torch.cat(parts, dim=-1)
    assert (product(x).double() - exact).norm() < error * exact.norm()
    added = product.add_to(residual, x).double()
    assert (added - before - exact).norm() < error * (exact + before).norm()
    assert torch.equal(residual, before)


def test_a_kernel_is_taken_flat() -> None:
    loaded = tensors(torch.float32)
    x = torch.randn(3, 40)
    product = load(loaded, {"kernel": 16}, 5, 2, 4)
    assert torch.allclose(product(x), x @ loaded["kernel.weight"].view(16, 40).T, atol=1e-5)


@pytest.mark.parametrize("activation", ["none", "gelu", "quick_gelu", "tanh_gelu", "swiglu", "geglu"])
def test_both_layouts_have_the_same_activations(activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, x = tensors(torch.float32), torch.randn(3, 40)
    made = load(loaded, {"q": 24, "k": 8}, 40, bias=True, activation=activation)
    residual = torch.randn_like(made(x))
    monkeypatch.setattr(linear, "library", lambda: None)
    plain = load(loaded, {"q": 24, "k": 8}, 40, bias=True, activation=activation)
    assert isinstance(made, PackedLinear) == (library() is not None)
    assert not isinstance(plain, PackedLinear)
    assert torch.allclose(made(x), plain(x), atol=1e-5)
    assert torch.allclose(made.add_to(residual, x), plain.add_to(residual, x), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_a_weight_with_nan_is_refused_by_name(dtype: torch.dtype) -> None:
    if library() is None:
        pytest.skip("no library of kernels: torch multiplies, and the answer fails for its numbers")
    loaded = tensors(dtype)
    loaded["k.weight"][7, 39] = torch.nan
    with pytest.raises(CheckpointError, match=r"q\.weight, k\.weight: it has numbers that are NaN"):
        load(loaded, {"q": 24, "k": 8}, 40)


@pytest.mark.parametrize("format_", [INT8, INT8_32_MINIMUMS, INT4, INT4_MINIMUMS])
def test_quantised_weights_are_joined(format_: Quantization, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where one of them is not quantised, because its width is no multiple of the group, say."""
    whole = {name: torch.randn(size, 64) for name, size in {"q.weight": 24, "k.weight": 8}.items()}

    @dataclass
    class Get:
        quantized: tuple[str, ...]
        dtype = torch.float32

        def __call__(self, name: str, _shape: tuple[int, ...], _dtype: str | None = None, /) -> Tensor:
            return whole[name]

        def matrix(self, name: str, _shape: tuple[int, ...], /) -> Tensor | QuantizedTensor:
            return quantize(whole[name], format_) if name in self.quantized else whole[name]

    x = torch.randn(5, 64)
    for names in (("q.weight", "k.weight"), ("k.weight",)):
        get = Get(names)
        exact = torch.cat([dequantize(quantize(w, format_)) if name in names else w for name, w in whole.items()])
        made = Linear.load(get, {"q": 24, "k": 8}, 64)(x)
        assert (made - x @ exact.T).norm() < 0.02 * (x @ exact.T).norm()
        with monkeypatch.context() as without:
            without.setattr(linear, "library", lambda: None)
            assert torch.allclose(Linear.load(get, {"q": 24, "k": 8}, 64)(x), x @ exact.T, atol=1e-4)


@pytest.mark.parametrize("orders", [(0, 0), (0, 1)])
@pytest.mark.parametrize("format_", [format_ for format_ in FORMATS.values() if format_.ordered], ids=str)
def test_weights_with_inputs_in_other_orders_are_joined(
    format_: Quantization, orders: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dequantised where the orders differ."""
    generator, inputs = torch.Generator().manual_seed(0), 128
    places = [torch.randperm(inputs, generator=generator).int() for _ in range(2)]
    made = dict[str, QuantizedTensor]()
    for name, size, order in zip(("q.weight", "k.weight"), (24, 8), orders, strict=True):
        values = torch.randint(0, 256, (size, inputs * format_.bits // 8), dtype=torch.uint8, generator=generator)
        groups = inputs // (format_.group or inputs)
        scales = torch.rand(size, groups, generator=generator) / 10
        zeros = torch.randint(0, 17, (size, groups), dtype=torch.uint8, generator=generator) if format_.zeros else None
        parts = (values.view(torch.int8), scales) if format_.bits == 8 else (values, scales.half())
        made[name] = QuantizedTensor(format_, *parts, zeros, places[order])

    class Get:
        dtype = torch.float32

        def __call__(self, name: str, _shape: tuple[int, ...], _dtype: str | None = None, /) -> Tensor:
            raise NotImplementedError(name)

        def matrix(self, name: str, _shape: tuple[int, ...], /) -> QuantizedTensor:
            return made[name]

    x = torch.randn(5, inputs, generator=generator)
    exact = torch.cat([x[:, weight.order] @ dequantize(replace(weight, order=None)).T for weight in made.values()], 1)
    product = Linear.load(Get(), {"q": 24, "k": 8}, inputs)
    assert (product(x) - exact).norm() < 0.02 * exact.norm()
    if isinstance(product, PackedLinear):
        assert (product.packed.quantization is None) == (orders == (0, 1))
    monkeypatch.setattr(linear, "library", lambda: None)
    assert torch.allclose(Linear.load(Get(), {"q": 24, "k": 8}, inputs)(x), exact, atol=1e-4)
