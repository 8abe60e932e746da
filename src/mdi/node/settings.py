"""How one node is started: its name, address, chunk and machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mdi.checkpoint.cache import Cache
from mdi.core.progress import Progress
from mdi.rpc.tls import Identity


@dataclass(frozen=True)
class NodeSettings:
    """The settings of one node.

    name: its own name, as in its certificate. role: the only one that it takes; empty where it takes any. chunk: the
    file that it loads; None waits until the starter offers one. listen: host:port; port 0 picks a free one. dtype:
    what the chunk must be in; None takes any. threads: to compute with; None leaves the number to torch. with_parent: a
    parent process reads errors from Status, so the node stays when its chunk cannot be loaded. insecure: addresses of
    other machines are allowed without encryption. identity: encrypts all links, and only nodes of the same authority
    may call; None encrypts nothing. cache: where chunks from the starter are kept; None takes none from it.
    hands_over: on the first signal the node waits until a spare has replaced it. progress: called while chunks are
    received and loaded.
    """

    name: str
    chunk: Path | None
    listen: str
    device: str = "cpu"
    dtype: str | None = None
    threads: int | None = None
    with_parent: bool = False
    insecure: bool = False
    identity: Identity | None = None
    cache: Cache | None = None
    hands_over: bool = False
    progress: Progress | None = None
    role: str = ""

    @property
    def link_place(self) -> tuple[str, int]:
        """Where other nodes link to it beside gRPC: host, and the port after its own, so that firewalls can allow it.

        Port 0 is a free one.
        """
        host, _, port = self.listen.rpartition(":")
        number = int(port or 0)
        return host, number + 1 if 0 < number < 65535 else 0
