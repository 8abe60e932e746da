"""What tests of commands share."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _access_log_as_before() -> Iterator[None]:
    """`mdi serve` turns it on for its process, which tests share."""
    log = logging.getLogger("mdi.access")
    before = log.handlers[:], log.level, log.propagate
    yield
    log.handlers[:], log.level, log.propagate = before
