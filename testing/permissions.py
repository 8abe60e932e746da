"""Folders that nothing can be written into, also for root."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PR_CAPBSET_DROP = 24
CAP_DAC_OVERRIDE = 1


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Takes the write permission from a folder and its subfolders: see `obey_permissions`."""
    folders = [folder, *(path for path in folder.rglob("*") if path.is_dir() and not path.is_symlink())]
    for each in folders:
        each.chmod(0o555)
    try:
        yield
    finally:
        for each in folders:
            each.chmod(0o755)


def obey_permissions() -> None:
    """For `preexec_fn`: the program that is started has no right to ignore permissions, even when it runs as root."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0)  # refused to others, who need not
