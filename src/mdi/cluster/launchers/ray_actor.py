"""The supervising actor of one node on a Ray cluster. It runs in a Ray worker on the node's machine: no torch here."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence

from mdi.cluster.launchers.process import NodeProcess
from mdi.core.errors import LinkError
from mdi.rpc.node_key import NodeKey

END_TIMEOUT_S = 5.0


class NodeActor:
    """Starts a node's process, watches it and ends it. The process ends with this one, however that ends.

    The node's private key is made here and does not leave the machine. Everything the node logs goes to the log of this
    actor (`ray logs`). host: where the node listens; the machine's address in the cluster.
    """

    def __init__(self, role: str, host: str = "") -> None:
        self._role = role
        self._host = host or _address_of_this_machine()
        self._key: NodeKey | None = None
        self._process: NodeProcess | None = None

    def __repr__(self) -> str:
        """What the dashboard and Ray's log lines show."""
        return f"mdi {self._role}"

    def certificate_request(self) -> bytes:
        """Makes a new key, and the request for its certificate, as PEM."""
        self._key = NodeKey.create()
        return self._key.request()

    def run(
        self, options: Sequence[str], certificate: bytes | None, authority: bytes, timeout_s: float
    ) -> tuple[str, str]:
        """Starts the node's process, after ending the one before; where it listens, or why it does not start.

        certificate: of the key made last; None starts a node without encryption. authority: its certificate, as PEM.
        """
        self._stop(self._process)
        try:
            identity = None
            if certificate:
                if self._key is None:
                    raise LinkError(f"the actor of {self._role} was placed anew, and has no key yet", self._role)
                identity = self._key.identity(self._role, certificate, authority)
            self._process = NodeProcess(self._role, options, self._host, identity, lambda _: None, sys.stderr)
            return self._process.address(time.monotonic() + timeout_s), ""
        except (LinkError, OSError) as error:
            self._stop(self._process)
            return "", str(error)

    def ended(self) -> str:
        """Waits until the process that runs now has ended; why it did."""
        assert self._process
        return str(self._process.wait())

    def note(self, text: str) -> None:
        """Writes a line about the node into the log of this actor."""
        print(f"{self._role}: {text}", file=sys.stderr, flush=True)  # noqa: T201

    def pids(self) -> tuple[int, int]:
        """Of this actor and of its node's process; 0 for one that does not run."""
        return os.getpid(), self._process.pid if self._process and not self._process.ended else 0

    def _stop(self, process: NodeProcess | None) -> None:
        if process:
            process.kill()
            process.close()


def _address_of_this_machine() -> str:
    import ray

    return str(ray.util.get_node_ip_address())
