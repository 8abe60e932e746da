"""The cores that this process may use: what its affinity and its container's CPU quota leave of the machine's."""

from __future__ import annotations

import os
from pathlib import Path

CGROUPS = Path("/proc/self/cgroup")
MOUNTED = Path("/sys/fs/cgroup")
LIMIT = "OMP_NUM_THREADS"
"""A person's own limit, as most programs that compute know it."""


def usable_cores() -> int:
    """How many threads can compute at the same time in this process; at least 1.

    A quota of one and a half cores is one: with two threads the system would stop both for a quarter of the time.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min(cores, quota_cores())))


def default_threads() -> int:
    """How many threads multiply matrices unless a setting says: one for each usable core, or what OMP_NUM_THREADS says.

    Of a list the first number counts; what is no number is as if it were not set.
    """
    first = os.environ.get(LIMIT, "").split(",")[0].strip()
    asked = int(first) if first.isdecimal() else 0
    return min(usable_cores(), asked) if asked else usable_cores()


def quota_cores(cgroups: Path = CGROUPS, mounted: Path = MOUNTED) -> float:
    """The CPU quota of this process's control groups in cores; infinity without one.

    Version 2 has `cpu.max` ("150000 100000", in microseconds, or "max 100000"), version 1 `cpu.cfs_quota_us` (-1: none)
    and `cpu.cfs_period_us`. The group itself and every group above it may have one; a container sees its own as the
    uppermost.
    """
    try:
        lines = cgroups.read_text().splitlines()
    except OSError:  # no Linux
        return float("inf")
    quotas = [float("inf")]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        group = mounted / controllers / path.lstrip("/")
        quotas += [_quota(folder) for folder in (group, *group.parents) if folder.is_relative_to(mounted)]
    return min(quotas)


def _quota(folder: Path) -> float:
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        cores = float("inf") if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return float("inf")
    return cores if cores > 0 else float("inf")
