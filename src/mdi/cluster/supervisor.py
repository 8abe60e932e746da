"""A link that outlives its nodes: lost ones are started anew and all of them wired again, within limits.

Knows launchers and links, and no requests: the engine decides what has to be computed again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from dataclasses import replace

from torch import Tensor

from mdi.cluster.delivery import Deliver, Delivery, GaveUp, Rewired
from mdi.cluster.launchers.base import Launcher
from mdi.cluster.link import GrpcLink, PipelineSettings
from mdi.cluster.monitor import Monitor
from mdi.cluster.recovery import LossLog
from mdi.core.batch import Batch
from mdi.core.config import RecoveryLimits
from mdi.core.errors import LinkError
from mdi.core.progress import Progress
from mdi.core.status import NodeStatus
from mdi.core.tracing import Span
from mdi.models.stage import Stage

log = logging.getLogger(__name__)

START_TIMEOUT_S = 600.0
TOGETHER_S = 0.1  # deaths this close are one: their nodes start at the same time


class Supervisor:
    """The link to a launcher's nodes, over all losses. Takes over the launcher: closing the one closes the other.

    Between a LinkError and the answer to `recover`, nothing else is delivered but late results.
    """

    def __init__(
        self,
        launcher: Launcher,
        monitor: Monitor,
        settings: PipelineSettings,
        limits: RecoveryLimits,
        deliver: Deliver,
        progress: Progress | None = None,
        stage: Stage | None = None,
    ) -> None:
        self._launcher = launcher
        self._limits = limits
        self._deliver = deliver
        self._lock = threading.RLock()
        self._wired = self._closing = False
        self._lost: dict[str, LinkError] = {}  # nodes at fault, and why
        self._losses = LossLog(limits, time.monotonic())
        self._away: frozenset[str] = frozenset()  # being started anew
        self._reasons: dict[str, str] = {}  # why nodes are lost, until all are back
        self._restarts: Counter[str] = Counter()
        self._thread: threading.Thread | None = None
        self._link = GrpcLink(monitor, settings, self._take, progress, stage)
        launcher.watch(self._note_death)

    def connect(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Wires the launcher's nodes for the first time. Raises LinkError when they do not come up."""
        self._link.wire(self._launcher.nodes, timeout_s)
        self._resume()

    def send(self, batch: Batch, hidden: Tensor) -> None:
        """See `Link.send`."""
        self._link.send(batch, hidden)

    def lost(self, error: LinkError) -> None:
        """See `Link.lost`."""
        with self._lock:
            if self._wired:  # otherwise a loss that is known ended the step
                self._note(self._link.named(error))

    def recover(self) -> None:
        """See `Link.recover`. Gives up, with the last error, at the limits."""
        self._thread = threading.Thread(target=self._recover, name="mdi-recovery", daemon=True)
        self._thread.start()

    def status(self) -> list[NodeStatus]:
        """What was last heard of every node, in pipeline order."""
        with self._lock:
            lost = self._away | self._lost.keys()
            reasons = dict(self._reasons)
        nodes = [replace(node, restarts=self._restarts[node.name]) for node in self._link.status()]
        return [
            replace(node, state="lost", error=reasons.get(node.name, node.error)) if node.name in lost else node
            for node in nodes
        ]

    def spans(self, record: bool) -> dict[str, list[Span]]:
        """See `GrpcLink.spans`."""
        return self._link.spans(record)

    def close(self) -> None:
        """Ends the links, then the nodes. Safe to call twice."""
        with self._lock:
            self._closing = True
        self._link.close()
        self._launcher.close()
        if self._thread:
            self._thread.join()

    def _take(self, event: Delivery) -> None:
        if isinstance(event, LinkError):
            self._note(event)
        else:
            self._deliver(event)

    def _note_death(self, error: LinkError) -> None:
        """From the launcher. While nodes are brought back, `Launcher.dead` counts instead."""
        with self._lock:
            if self._wired:
                self._note(error)

    def _note(self, error: LinkError) -> None:
        with self._lock:
            if self._closing:
                return
            self._lost.setdefault(error.node, error)
            self._reasons.setdefault(error.node, str(error))
            if self._wired:
                self._wired = False
                self._link.leave_group()
                self._losses.interrupted(time.monotonic())
                log.warning("%s; recovering", error)
                self._deliver(error)

    def _recover(self) -> None:
        started_s = time.monotonic()
        try:
            self._link.unwire()  # nothing more arrives of what is known already
            time.sleep(TOGETHER_S)
            while not self._wire_again(deadline=started_s + self._limits.recovery_timeout_s):
                pass
        except LinkError as error:
            self._give_up(error)
        except Exception:
            log.exception("lost nodes could not be brought back")
            self._give_up(LinkError("lost nodes could not be brought back; the server's log has the details"))
        else:
            log.warning("all nodes are back after %.1f s", time.monotonic() - started_s)
            self._resume(Rewired())

    def _give_up(self, error: LinkError) -> None:
        self._away = frozenset(self._launcher.dead())
        if not self._closing:
            log.error("%s; giving up", error)
            self._deliver(GaveUp(error))

    def _wire_again(self, deadline: float) -> bool:
        """One attempt. What goes wrong is noted for the next; raises LinkError when there is to be none."""
        self._away = self._lost_nodes(deadline)
        try:
            self._restarts.update(self._away)
            self._launcher.restart(self._away, deadline - time.monotonic())
            self._away = frozenset()
            self._link.wire(self._launcher.nodes, deadline - time.monotonic())
        except LinkError as error:
            log.warning("%s; trying again", error)
            self._note(error)
            return False
        return True

    def _lost_nodes(self, deadline: float) -> frozenset[str]:
        """Takes the names of those to start anew."""
        with self._lock:
            if self._closing:
                raise LinkError("the link was closed")
            lost, self._lost = self._lost, {}
        dead = self._launcher.dead()
        lost |= {name: _ended(name) for name in dead - lost.keys()}
        for name, error in lost.items():
            if time.monotonic() > deadline:
                raise LinkError(f"the nodes were not back within {self._limits.recovery_timeout_s:g} s: {error}", name)
            if self._losses.lost(name, ended=name in dead):
                raise LinkError(f"{error}; the node was lost {self._limits.max_losses + 1} times in a row", name)
        return frozenset(lost.keys() & {node.name for node in self._launcher.nodes})

    def _resume(self, *answer: Rewired) -> None:
        """All nodes are wired: delivers the answer, and then the losses of the meantime."""
        with self._lock:
            self._wired = True
            self._reasons.clear()
            self._losses.wired(time.monotonic())
            for event in answer:
                self._deliver(event)
            lost = list(self._lost.values())
        for error in lost or map(_ended, self._launcher.dead()):
            self._note(error)


def _ended(name: str) -> LinkError:
    return LinkError(f"node {name} ended", name)
