"""Free memory, as far as this process may use it: of the machine or device, and of its control group."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

OWN_GROUPS = Path("/proc/self/cgroup")
ALL_GROUPS = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> float:
    """Bytes that are free for this process on a device."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return min(float(psutil.virtual_memory().available), group_free_bytes())


def group_free_bytes(own: Path = OWN_GROUPS, root: Path = ALL_GROUPS) -> float:
    """What the control groups of this process allow it yet, as in containers; infinite without a limit.

    Cached files that are not in use count as free.
    """
    free = math.inf
    for files, folder in _memory_groups(own, root):
        with contextlib.suppress(OSError, ValueError, KeyError):  # "max", or a group that is not visible here
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            used = int((folder / files.used).read_text()) - int(stat[files.reclaimable])
            free = min(free, max(0, int((folder / files.limit).read_text()) - used))
    return free


@dataclass(frozen=True)
class _Files:
    """Names in a group's folder, and in its memory.stat."""

    limit: str
    used: str
    reclaimable: str


_V1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = _Files("memory.max", "memory.current", "inactive_file")


def _memory_groups(own: Path, root: Path) -> Iterator[tuple[_Files, Path]]:
    """The folders of the groups that limit this process, each with all that it is part of."""
    with contextlib.suppress(OSError):
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            files, top = (_V1, root / "memory") if controllers else (_V2, root)
            group = Path(path.lstrip("/"))
            yield from ((files, top / part) for part in (group, *group.parents))
