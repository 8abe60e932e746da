"""Requests in, tokens out."""

from mdi.core.outputs import Completion, FinishReason, Piece, RecoveryStatus, Sample, Usage
from mdi.engine.engine import Engine
from mdi.engine.stream import Stream
from mdi.pipeline.link import NodeStatus

__all__ = ["Completion", "Engine", "FinishReason", "NodeStatus", "Piece", "RecoveryStatus", "Sample", "Stream", "Usage"]
