"""Shape and type of a tensor, known before it is read: what bytes are counted from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Protocol

from mdi.core.quantization import FORMATS, Quantization, QuantizedTensor

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "I32": 4, "I8": 1, "U8": 1}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and type of one tensor of a checkpoint or a chunk.

    dtype: a name of `core.dtypes` or of a quantisation, or how the file stores it where that is something else
    ("float64", "I8").
    """

    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """Elements."""
        return prod(self.shape)

    @property
    def quantization(self) -> Quantization | None:
        """The format of a quantised matrix."""
        return FORMATS.get(self.dtype)

    @property
    def size_bytes(self) -> int:
        """With all parts of a quantised matrix. Raises KeyError for a type whose bytes are not known."""
        if quantization := self.quantization:
            return sum(spec.size_bytes for spec in _quantized_parts("", self.shape, quantization).values())
        return self.size * ITEM_BYTES[self.dtype]


Specs = dict[str, TensorSpec]
"""Tensors by name, in the order of their file."""


def stored_specs(specs: Specs) -> Specs:
    """The tensors that a file holds for these: its parts in place of each quantised matrix."""
    stored: Specs = {}
    for name, spec in specs.items():
        stored |= _quantized_parts(name, spec.shape, spec.quantization) if spec.quantization else {name: spec}
    return stored


def scale_name(weight: str) -> str:
    """The name of the scales of a quantised matrix."""
    return f"{weight}_scale"


def zero_name(weight: str) -> str:
    """The name of the zeros of a quantised matrix."""
    return f"{weight}_zero"


def order_name(weight: str) -> str:
    """The name of the order of a quantised matrix's inputs."""
    return f"{weight}_order"


def minimum_name(weight: str) -> str:
    """The name of the minimums of a quantised matrix."""
    return f"{weight}_minimum"


def _quantized_parts(name: str, shape: tuple[int, ...], quantization: Quantization) -> Specs:
    """What `QuantizedTensor` describes, for a matrix whose inputs are all dimensions but the first."""
    outputs, inputs = shape[0], prod(shape[1:])
    values = TensorSpec((outputs, inputs * quantization.bits // 8), "I8" if quantization.bits == 8 else "U8")
    groups = (outputs, inputs // quantization.group if quantization.group else 1)
    scales = TensorSpec(groups, "float32" if quantization.bits == 8 else "float16")
    parts = {name: values, scale_name(name): scales}
    if quantization.zeros:
        parts[zero_name(name)] = TensorSpec(groups, "U8")
    if quantization.ordered:
        parts[order_name(name)] = TensorSpec((inputs,), "I32")
    if quantization.minimums:
        parts[minimum_name(name)] = scales
    return parts


def total_size(specs: Iterable[TensorSpec]) -> int:
    """Elements of all of them together."""
    return sum(spec.size for spec in specs)


def total_bytes(specs: Iterable[TensorSpec]) -> int:
    """Bytes of all of them together."""
    return sum(spec.size_bytes for spec in specs)


class GetTensor(Protocol):
    """Gives a layer its tensors. The same calls declare what a model needs and load it (`models.weights`)."""

    @property
    def dtype(self) -> torch.dtype:
        """The stage's own."""

    def __call__(self, name: str, shape: tuple[int, ...], dtype: str | None = None, /) -> Tensor:
        """One tensor of this shape, in `dtype`, or the stage's own where that is None. Each name is got once."""

    def matrix(self, name: str, shape: tuple[int, ...], /) -> Tensor | QuantizedTensor:
        """The weight of a product: [outputs, *inputs] in the stage's own dtype, or quantised, [outputs, inputs]."""


@dataclass(frozen=True)
class Unquantized:
    """A `GetTensor` that gives what a function gives, of no quantisation. dtype: of the stage."""

    get: Callable[[str, tuple[int, ...], str | None], Tensor]
    dtype: torch.dtype

    def __call__(self, name: str, shape: tuple[int, ...], dtype: str | None = None, /) -> Tensor:
        return self.get(name, shape, dtype)

    def matrix(self, name: str, shape: tuple[int, ...], /) -> Tensor:
        return self.get(name, shape, None)


@dataclass(frozen=True)
class _Within:
    prefix: str
    get: GetTensor

    @property
    def dtype(self) -> torch.dtype:
        return self.get.dtype

    def __call__(self, name: str, shape: tuple[int, ...], dtype: str | None = None, /) -> Tensor:
        return self.get(self.prefix + name, shape, dtype)

    def matrix(self, name: str, shape: tuple[int, ...], /) -> Tensor | QuantizedTensor:
        return self.get.matrix(self.prefix + name, shape)


def within(prefix: str, get: GetTensor) -> GetTensor:
    """`get` for the names behind a prefix."""
    return _Within(prefix, get)
