"""What is known of the nodes while they run. Plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

NodeState = Literal["waiting", "receiving", "loading", "loaded", "ready", "failed", "lost", "leaving"]
"""waiting, receiving: its weights; a spare waits for a role, too. loaded: the weights are there, the links are not.
failed: the chunk is no good. lost: dead or silent. leaving: told to end, it waits to be replaced."""


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """What a node holds and does, as last heard of it.

    first_layer, last_layer: its decoder layers, half-open. resident_bytes: memory as the operating system counts it.
    busy_share: of the last second or more, spent computing. sent_bytes, received_bytes: over its links since it
    started. round_trip_s: of the last heartbeat; None for the starter. restarts: how often it was started anew.
    spare: a spare's own name; `name` is the role it took, or the same.
    """

    name: str
    state: NodeState
    first_layer: int
    last_layer: int
    dtype: str
    device: str
    resident_bytes: int
    pid: int
    busy_share: float
    sent_bytes: int
    received_bytes: int
    round_trip_s: float | None = None
    restarts: int = 0
    spare: str = ""


@dataclass(frozen=True, slots=True)
class RecoveryStatus:
    """How it went with lost nodes. recovering: some are being brought back now; what runs waits.

    recoveries: how often that began. failed_requests: those that ended because nodes did not come back.
    """

    recovering: bool
    recoveries: int
    failed_requests: int
