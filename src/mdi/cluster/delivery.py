"""The contract between a link and the engine: what a link delivers, and what it is called for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from mdi.core.batch import Batch, Result
from mdi.core.errors import LinkError


@dataclass(frozen=True, slots=True)
class Rewired:
    """The nodes are back, with empty caches: batches that are sent from now on arrive."""


@dataclass(frozen=True, slots=True)
class GaveUp:
    """The nodes will not come back."""

    error: LinkError


Delivery = Result | LinkError | Rewired | GaveUp
Deliver = Callable[[Delivery], None]
"""Takes results in the order batches were sent, and what happens to the link; called from the link's threads.

After a LinkError nothing in flight comes back: the engine calls `recover`, and Rewired or GaveUp follows.
"""


class Link(Protocol):
    """From the first stage to all the others."""

    def send(self, batch: Batch, hidden: Tensor) -> None:
        """Sends a batch, in order, without waiting for the network. hidden: [tokens, hidden_size]."""

    def lost(self, error: LinkError) -> None:
        """Says that a rank of the first stage is gone, which the error names. Delivered like any other loss."""

    def recover(self) -> None:
        """Begins to bring lost nodes back, after a LinkError, without waiting for them."""
