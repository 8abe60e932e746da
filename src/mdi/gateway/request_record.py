"""What is known of a request beside its content: for the log, and for the limits of keys."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from starlette.types import Scope

from mdi.core.outputs import Usage
from mdi.gateway.engine import Running

PLACE = "mdi.record"  # in a request's scope
REQUEST_ID = "x-request-id"  # the header


@dataclass
class RequestRecord:
    """One request.

    key: the name of its API key. running: what it computes. late_error: of an answer that had begun. began_s: when its
    head had come, by time.monotonic.
    """

    id: str
    key: str = "-"
    running: Running | None = None
    late_error: int | None = None
    began_s: float = field(default_factory=time.monotonic)

    @property
    def usage(self) -> Usage:
        """Tokens so far, of a request that computes some."""
        return self.running.usage if self.running else Usage(0, 0)


def record_of(scope: Scope) -> RequestRecord:
    """The record of a request, which its outermost check has made."""
    record = scope[PLACE]
    assert isinstance(record, RequestRecord)
    return record
