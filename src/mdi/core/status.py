"""The status of nodes, of the plan, of requests and of recovery. Plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mdi.core.group import Rank
from mdi.core.histogram import Distribution
from mdi.core.quantization import UNQUANTIZED, ModelQuantization

NodeState = Literal["waiting", "receiving", "loading", "loaded", "ready", "failed", "lost", "leaving"]
"""waiting: for its weights or, as a spare, for a role. receiving: its weights. loaded: weights, but no links yet.
failed: its chunk cannot be used. lost: dead or silent. leaving: asked to end, until a spare has replaced it."""

NodeRole = Literal["starter", "secondary", "finisher", "vision", "spare"]
"""starter: takes requests. secondary: middle layers. finisher: draws the tokens. spare: waits for a node to be lost."""

StagePart = Literal["embedding", "vision", "head"]
"""What a stage has besides layers."""


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """The last known status of one node.

    first_layer, last_layer: its decoder layers, half-open. resident_bytes: memory as the operating system counts it.
    busy_share: part of the last second or more that it computed. sent_bytes, received_bytes: over its links since it
    started; group_received_bytes: those of the latter that came from other ranks of its group. round_trip_s: of the
    last heartbeat; None for the starter. restarts: how often it was started again. name: its role, or the id of a spare
    without one. spare: the id of a spare. node: its own id, as in its certificate. quantization: of the model. kernels:
    what computes: an instruction set of the kernels, or "torch". error: why it is lost or failed. group, rank: which
    stage of the pipeline it computes, and as which of that stage's nodes; None for those beside the pipeline. shards:
    what it has of its stage; None where it has all. steps, step_s: batches that it computed since its links were made,
    and the seconds that they took, its draws of tokens included.
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
    node: str = ""
    kernels: str = ""
    quantization: ModelQuantization = UNQUANTIZED
    role: NodeRole = "starter"
    group: int | None = None
    rank: int | None = None
    shards: Rank | None = None
    group_received_bytes: int = 0
    error: str = ""
    steps: int = 0
    step_s: float = 0.0


@dataclass(frozen=True, slots=True)
class StageStatus:
    """What the plan gives one node. first_layer, last_layer: half-open. holds: what it has besides layers.

    step_share: its part of the weights that one decode step reads. group, rank: which stage of the pipeline it
    computes, and as which of that stage's nodes, which share its layers; None for those beside the pipeline. shards:
    what it has of its stage; None where it has all.
    """

    node: str
    first_layer: int
    last_layer: int
    holds: tuple[StagePart, ...]
    step_share: float
    group: int | None = None
    rank: int | None = None
    shards: Rank | None = None


@dataclass(frozen=True, slots=True)
class PlanStatus:
    """How the layers are split over the nodes, and why. stages: in pipeline order, a vision node last."""

    n_layers: int
    reason: str
    stages: tuple[StageStatus, ...]


@dataclass(frozen=True, slots=True)
class Load:
    """How many requests are being computed, and how many wait: for their media, their prompt or a slot."""

    running: int
    waiting: int


@dataclass(frozen=True, slots=True)
class CacheStatus:
    """The KV cache. used_share: part of its memory that running sequences hold.

    preemptions: how often one lost its place for lack of memory, to be computed again later.
    """

    used_share: float
    preemptions: int


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """What the KV cache has memory for: n_blocks of block_tokens each, in dtype.

    max_sequences: that run at once. sequence_length: of the longest one.
    """

    block_tokens: int
    n_blocks: int
    dtype: str
    max_sequences: int
    sequence_length: int


@dataclass(frozen=True, slots=True)
class Measurements:
    """What the engine has measured since it started.

    batch_tokens: tokens of each batch. encode_s: seconds from the start of each image's or video's encoding to its
    embeddings, batches in between included. recovery_s: seconds of each recovery, from the loss until batches flow
    again. replayed_tokens: that were computed again after a loss. media_queries: images and videos that prompts showed;
    media_hits: those of them whose embeddings were kept. recoveries: when the last ones began and ended, by
    time.monotonic, those that failed included.
    """

    batch_tokens: Distribution
    encode_s: Distribution
    recovery_s: Distribution
    replayed_tokens: int
    media_queries: int
    media_hits: int
    recoveries: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True, slots=True)
class RecoveryStatus:
    """Recovery from lost nodes. recovering: nodes are being brought back now, and running requests wait.

    recoveries: how often that began. failed_requests: those that ended because nodes did not come back.
    """

    recovering: bool
    recoveries: int
    failed_requests: int
