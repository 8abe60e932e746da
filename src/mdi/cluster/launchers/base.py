"""What the cluster needs of whatever brings nodes up."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Protocol

from mdi.cluster.link import NodeAddress
from mdi.core.errors import LinkError
from mdi.core.status import NodeStatus

Died = Callable[[LinkError], None]


class Launcher(Protocol):
    """Whoever brings nodes up, first and again."""

    @property
    def nodes(self) -> list[NodeAddress]:
        """Where all of them listen, in pipeline order."""

    def watch(self, died: Died) -> None:
        """Calls back, from a thread, when a node ends before it was told to."""

    def dead(self) -> set[str]:
        """Names of the nodes that have ended."""

    def restart(self, names: Collection[str], timeout_s: float) -> None:
        """Ends these nodes, if they still run, and starts them anew; returns when they listen.

        Raises LinkError with the name of one that cannot be started, or not within `timeout_s`.
        """

    def restarts(self, name: str) -> int:
        """How often a node was started anew."""

    def spares(self) -> list[NodeStatus]:
        """Nodes without a place, there to take one."""

    def close(self) -> None:
        """Ends every node and waits for it. Safe to call twice."""
