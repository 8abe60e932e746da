"""Requests in, tokens out."""

from mdi.core.outputs import Completion, FinishReason, Piece, Sample, Usage
from mdi.core.status import NodeStatus, RecoveryStatus
from mdi.engine.engine import Engine
from mdi.engine.stream import Stream

__all__ = ["Completion", "Engine", "FinishReason", "NodeStatus", "Piece", "RecoveryStatus", "Sample", "Stream", "Usage"]
