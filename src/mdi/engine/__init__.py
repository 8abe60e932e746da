"""Requests in, tokens out."""

from mdi.engine.engine import Engine
from mdi.engine.outputs import Completion, FinishReason, Piece, Sample, Usage
from mdi.engine.stream import Stream

__all__ = ["Completion", "Engine", "FinishReason", "Piece", "Sample", "Stream", "Usage"]
