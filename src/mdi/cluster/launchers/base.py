"""The launcher's contract: what the cluster needs of it to bring nodes up, first and again."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Protocol

from mdi.cluster.node_client import NodeAddress
from mdi.core.errors import LinkError

Died = Callable[[LinkError], None]
"""Called from a thread with the loss of a node, which the error names."""


class Launcher(Protocol):
    """Brings nodes up. To construct one starts nothing."""

    @property
    def nodes(self) -> list[NodeAddress]:
        """Where all of them listen, in pipeline order. Once started."""

    def watch(self, died: Died) -> None:
        """Sets what is called when a node ends that was not meant to."""

    def start(self) -> None:
        """Returns when every node listens. Raises LinkError, naming one that does not."""

    def dead(self) -> set[str]:
        """Names of the nodes that have ended."""

    def restart(self, names: Collection[str], timeout_s: float) -> None:
        """Ends these nodes, if they still run, and starts them anew; returns when they listen.

        Raises LinkError with the name of one that cannot be started, or not within `timeout_s`.
        """

    def close(self) -> None:
        """Ends what was started, and any wait. Safe to call twice."""
