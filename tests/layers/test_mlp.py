"""Mixtures of experts: the numbers of plain torch, with kernels and without; no row depends on those beside it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mdi.core.group import InputShards
from mdi.core.quantization import INT4, INT8, QuantizedTensor
from mdi.kernels.library import library
from mdi.layers.mlp import Experts
from mdi.layers.quantize import dequantize, quantize

HIDDEN, INNER, COUNT, PER_TOKEN = 192, 128, 11, 3
SHARDS = InputShards((0, 64, INNER), 64)
FORMATS = {"int8": INT8, "int4": INT4}
KINDS = [torch.float32, torch.bfloat16, torch.float16, "int8", "int4"]
Kind = torch.dtype | str

needs_kernels = pytest.mark.skipif(library() is None, reason="only our kernels give rows the same bits")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Weights:
    """A `GetTensor` of random weights. kind: a dtype, or the format of the experts in bfloat16."""

    def __init__(self, kind: Kind, router: Tensor | None = None) -> None:
        self.dtype = torch.bfloat16 if isinstance(kind, str) else kind
        self.kind, self.router = kind, router

    def __call__(self, name: str, shape: tuple[int, ...], _dtype: str | None = None, /) -> Tensor:
        if name == "mlp.gate.weight" and self.router is not None:
            return self.router.to(self.dtype)
        return random(*shape, seed=sum(map(ord, name))).div(shape[-1] ** 0.5).to(self.dtype)

    def matrix(self, name: str, shape: tuple[int, ...], /) -> Tensor | QuantizedTensor:
        weight = self(name, shape)
        return quantize(weight, FORMATS[self.kind]) if isinstance(self.kind, str) else weight

    def exact(self, name: str, *shape: int) -> Tensor:
        weight = self.matrix(name, shape)
        return dequantize(weight).double() if isinstance(weight, QuantizedTensor) else weight.double()


def experts(kind: Kind, *, normalised: bool = True, router: Tensor | None = None) -> Experts:
    sizes: dict[str, Any] = {"count": COUNT, "per_token": PER_TOKEN}
    return Experts(Weights(kind, router), "mlp", HIDDEN, INNER, **sizes, normalised=normalised)


def rows(count: int, dtype: torch.dtype, seed: int = 7) -> Tensor:
    return random(count, HIDDEN, seed=seed).to(dtype)


def expected(kind: Kind, x: Tensor, normalised: bool) -> Tensor:
    """As `Qwen3MoeSparseMoeBlock` of transformers, in float64 but for the choice."""
    weights = Weights(kind)
    logits = functional.linear(x, weights("mlp.gate.weight", (COUNT, HIDDEN)))
    shares, chosen = torch.topk(logits.softmax(-1, dtype=torch.float32), PER_TOKEN)
    if normalised:
        shares = shares / shares.sum(-1, keepdim=True)
    made = torch.zeros(len(x), HIDDEN, dtype=torch.float64)
    for index in range(COUNT):
        name = f"mlp.experts.{index}"
        gate, up = (weights.exact(f"{name}.{part}_proj.weight", INNER, HIDDEN) for part in ("gate", "up"))
        down = weights.exact(f"{name}.down_proj.weight", HIDDEN, INNER)
        outputs = (functional.silu(x.double() @ gate.T) * (x.double() @ up.T)) @ down.T
        made += (shares * (chosen == index)).sum(-1, keepdim=True) * outputs
    return made


def difference(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact).abs().max() / exact.abs().max())


ERRORS = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3, "int8": 4e-2, "int4": 4e-2}


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_mixture_is_the_sum_of_what_the_router_chooses(
    kind: Kind, normalised: bool, kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernels:
        monkeypatch.setattr("mdi.layers.linear.library", lambda: None)
    mixture = experts(kind, normalised=normalised)
    assert (mixture.packed is not None) == (kernels and library() is not None)
    for count in (1, 4, 70):
        x, residual = rows(count, Weights(kind).dtype), rows(count, Weights(kind).dtype, seed=8)
        exact = expected(kind, x, normalised)
        assert difference(mixture(x), exact) < ERRORS[kind]
        before = residual.clone()
        for shards in (None, SHARDS):
            assert difference(mixture.add_to(residual, x, shards), exact + residual.double()) < ERRORS[kind]
        assert torch.equal(residual, before)


def test_the_choice_is_that_of_torch_topk() -> None:
    x, mixture = rows(200, torch.float32), experts(torch.float32)
    probabilities = mixture.router(x).softmax(-1)
    chosen, shares = mixture.choose(x)
    assert torch.equal(chosen, torch.topk(probabilities, PER_TOKEN).indices)
    assert torch.allclose(shares.sum(-1), torch.ones(200))


@pytest.mark.parametrize("kernels", [True, False])
def test_of_equal_shares_the_first_experts_are_chosen(kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not kernels:
        monkeypatch.setattr("mdi.layers.linear.library", lambda: None)
    router = torch.zeros(COUNT, HIDDEN)
    router[5] = 1e-3
    mixture, x = experts(torch.float32, router=router), rows(3, torch.float32).abs()
    assert mixture.choose(x)[0].tolist() == [[5, 0, 1]] * 3
    parts = [mixture.mlps[index](x) for index in (5, 0, 1)]
    _, shares = mixture.choose(x)
    exact = sum(share[:, None].double() * part.double() for share, part in zip(shares.T, parts, strict=True))
    assert isinstance(exact, Tensor)
    assert difference(mixture(x), exact) < 1e-5


@needs_kernels
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_row_has_the_same_bits_alone_and_among_others(kind: Kind) -> None:
    x, residual = rows(70, Weights(kind).dtype), rows(70, Weights(kind).dtype, seed=8)
    mixture = experts(kind)
    together = mixture.add_to(residual, x, SHARDS)
    for row in range(0, 70, 9):
        part = slice(row, row + 1)
        assert torch.equal(mixture.add_to(residual[part], x[part], SHARDS), together[part])
    assert torch.equal(mixture.add_to(residual[3:30], x[3:30], SHARDS), together[3:30])


@pytest.fixture
def set_threads() -> Callable[[int], None]:
    loaded = library()
    assert loaded is not None
    return loaded.shared("set_threads", ctypes.c_int)


@needs_kernels
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_any_number_of_threads_gives_the_same_bits(kind: Kind, set_threads: Callable[[int], None]) -> None:
    loaded = library()
    assert loaded is not None
    before = loaded.shared("threads", result=ctypes.c_int)()
    x, mixture = rows(40, Weights(kind).dtype), experts(kind)
    try:
        made = []
        for threads in (1, 2, 5):
            set_threads(threads)
            made.append((mixture(x), mixture(x[:1])))
    finally:
        set_threads(before)
    assert all(torch.equal(many, made[0][0]) and torch.equal(one, made[0][1]) for many, one in made)


@needs_kernels
def test_an_infinite_row_spoils_no_other() -> None:
    x, mixture = rows(6, torch.float32), experts(torch.float32)
    exact = mixture(x)
    x[2], x[4, 0] = torch.nan, torch.inf
    made = mixture(x)
    assert torch.equal(made[[0, 1, 3, 5]], exact[[0, 1, 3, 5]])
    assert not made[[2, 4]].isfinite().all(-1).any()
