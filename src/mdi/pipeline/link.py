"""What carries batches from the first stage to the others and tokens back: the seam between engine and network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from mdi.errors import LinkError
from mdi.model.batch import Batch, Token
from mdi.pipeline.stage import Stage


@dataclass(frozen=True, slots=True)
class Result:
    """The drawn tokens of a batch: one per slice that draws, in the slices' order."""

    batch_id: int
    tokens: tuple[Token, ...]


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """What a node holds: decoder layers [first_layer, last_layer), and its memory as the operating system counts it."""

    name: str
    first_layer: int
    last_layer: int
    dtype: str
    device: str
    resident_bytes: int
    pid: int


Deliver = Callable[[Result | LinkError], None]
"""Takes results, and the error that ends a link; called from the link's thread, in the order batches were sent."""


class Link(Protocol):
    """From the first stage to all the others."""

    def send(self, batch: Batch, hidden: Tensor) -> None:
        """Hands a batch over. hidden: [tokens, hidden_size]. Keeps the order; does not wait for the network."""

    def close(self) -> None:
        """Ends the link; nothing is delivered afterwards. Safe to call twice."""


class LocalLink:
    """Runs the later stages in this process, inside `send`: one thread, no network."""

    def __init__(self, stages: Sequence[Stage], deliver: Deliver) -> None:
        self._stages = stages
        self._deliver = deliver

    def send(self, batch: Batch, hidden: Tensor) -> None:
        out: Tensor | tuple[Token, ...] = hidden
        for stage in self._stages:
            assert isinstance(out, Tensor)
            out = stage.run(batch, out)
        assert isinstance(out, tuple)
        self._deliver(Result(batch.id, out))

    def close(self) -> None:
        pass
