"""Finds the processes that a test started."""

from __future__ import annotations

import psutil


def node_processes() -> list[psutil.Process]:
    """Node processes started by this one that still run."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if child.status() != psutil.STATUS_ZOMBIE and "secondary" in child.cmdline()]
