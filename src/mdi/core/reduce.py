"""Where the partial sums of a stage's ranks meet."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Reduce(Protocol):
    """Adds up what the ranks of a group computed, each from its own part of a weight's inputs."""

    def __call__(self, partial: Tensor) -> Tensor:
        """The sum over all ranks, the same bits on each; may overwrite `partial`. partial: [rows, outputs]."""


def alone(partial: Tensor) -> Tensor:
    """`Reduce` of a stage that one node computes: there is nothing to add."""
    return partial
