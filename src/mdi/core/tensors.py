"""Shape and type of a tensor, known before it is read: what bytes are counted from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and type of one tensor of a checkpoint or a chunk.

    dtype: a name of `core.dtypes`, or how the file stores it where that is something else ("float64", "I8").
    """

    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """Elements."""
        return prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """Raises KeyError for a type whose bytes are not known."""
        return self.size * ITEM_BYTES[self.dtype]


Specs = dict[str, TensorSpec]
"""Tensors by name, in the order of their file."""


def total_size(specs: Iterable[TensorSpec]) -> int:
    """Elements of all of them together."""
    return sum(spec.size for spec in specs)


def total_bytes(specs: Iterable[TensorSpec]) -> int:
    """Bytes of all of them together."""
    return sum(spec.size_bytes for spec in specs)


class GetTensor(Protocol):
    """Gives a layer its tensors. The same calls declare what a model needs and load it (`models.weights`)."""

    def __call__(self, name: str, shape: tuple[int, ...], dtype: str | None = None, /) -> Tensor:
        """One tensor of this shape, in `dtype`, or the stage's own where that is None. Each name is got once."""


def within(prefix: str, get: GetTensor) -> GetTensor:
    """`get` for the names behind a prefix."""
    return lambda name, shape, dtype=None: get(prefix + name, shape, dtype)
