"""What carries batches from the first stage to the others and tokens back: the seam between engine and network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from mdi.core.batch import Batch, Result, Token
from mdi.core.errors import LinkError
from mdi.models.stage import Stage


@dataclass(frozen=True, slots=True)
class Rewired:
    """The nodes are back, with empty caches: what is sent from now on arrives."""


@dataclass(frozen=True, slots=True)
class GaveUp:
    """The nodes will not come back."""

    error: LinkError


Delivery = Result | LinkError | Rewired | GaveUp
Deliver = Callable[[Delivery], None]
"""Takes results in the order batches were sent, and what happens to the link; called from the link's threads.

After a LinkError nothing in flight comes back: `recover` is asked for, and answered with Rewired or GaveUp.
"""


class Link(Protocol):
    """From the first stage to all the others."""

    def send(self, batch: Batch, hidden: Tensor) -> None:
        """Hands a batch over. hidden: [tokens, hidden_size]. Keeps the order; does not wait for the network."""

    def recover(self) -> None:
        """Begins to bring lost nodes back, after a LinkError; does not wait for them."""

    def close(self) -> None:
        """Ends the link; nothing is delivered afterwards. Safe to call twice."""


class LocalLink:
    """Runs the later stages in this process, inside `send`: one thread, no network, nothing to lose."""

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

    def recover(self) -> None:
        self._deliver(Rewired())

    def close(self) -> None:
        pass
