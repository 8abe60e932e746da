from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mdi.core.dtypes import parse_dtype
from mdi.core.tensors import Unquantized
from mdi.kernels import norms as kernels
from mdi.layers.norm import LayerNorm, RMSNorm


def get(name: str, shape: tuple[int, ...], dtype: str | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(len(name))
    return (1 + 0.1 * torch.randn(shape, generator=generator)).to(parse_dtype(dtype or "bfloat16"))


@pytest.mark.parametrize("dtype", ["float32", None])
def test_a_root_mean_square_norm_keeps_the_dtype_of_its_input(dtype: str | None) -> None:
    norm = RMSNorm(Unquantized(get, torch.bfloat16), "norm", 64, 1e-6, dtype)
    assert norm.weight.dtype == parse_dtype(dtype or "bfloat16")
    x = torch.randn(5, 64).bfloat16()
    exact = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight.double()
    assert norm(x).dtype == torch.bfloat16
    assert (norm(x).double() - exact).norm() < 0.005 * exact.norm()


@pytest.mark.parametrize("computed_by", ["kernels", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_norm_with_an_offset_is_rounded_once(
    computed_by: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Gemma's: the offset is added in float32, not to a rounded weight."""
    if computed_by == "torch":
        monkeypatch.setattr(kernels, "library", lambda: None)
    generator = torch.Generator().manual_seed(0)
    stored = (torch.randn(70, generator=generator) / 300).to(dtype)
    norm = RMSNorm(Unquantized(lambda *_: stored, dtype), "norm", 70, 1e-6, offset=1.0, scale=0.75)
    x, residual = torch.randn(2, 5, 70, generator=generator).to(dtype)
    exact = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + stored.double()) * 0.75
    half = torch.finfo(dtype).eps / 2 + 1e-6
    assert ((norm(x).double() - exact).abs() <= half * exact.abs() + 1e-6).all()
    added = norm.add_to(residual, x)
    assert added.dtype == dtype
    exact = exact + residual.double()
    assert ((added.double() - exact).abs() <= half * exact.abs() + 1e-6).all()


def test_a_layer_norm_has_mean_and_spread_of_its_weight_and_bias() -> None:
    norm = LayerNorm(Unquantized(get, torch.bfloat16), "norm", 64, 1e-6)
    x = torch.randn(5, 64).bfloat16()
    centred = x.double() - x.double().mean(-1, keepdim=True)
    exact = centred / centred.pow(2).mean(-1, keepdim=True).sqrt() * norm.weight.double() + norm.bias.double()
    assert (norm(x).double() - exact).norm() < 0.005 * exact.norm()
