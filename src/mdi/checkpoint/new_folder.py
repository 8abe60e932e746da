"""Folders that appear under their name only when everything in them is written."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mdi.checkpoint.cache import RESERVE_BYTES
from mdi.checkpoint.locks import exclusive
from mdi.core.errors import CheckpointError


class FolderInUseError(CheckpointError):
    """A folder is not replaced while something uses it."""


@contextmanager
def new_folder(folder: Path, size_bytes: int, what: str) -> Iterator[Path]:
    """Gives an unfinished folder, which replaces `folder` at the end and is removed when something fails.

    what: the contents, for messages. Raises CheckpointError when `size_bytes` do not fit on the disk or it cannot be
    written, FolderInUseError when `folder` is in use.
    """
    unfinished = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _clear_remains(folder)
        _check_space(folder.parent, size_bytes, what)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        with exclusive(unfinished):
            yield unfinished
            _put_in_place(unfinished, folder)
    except OSError as error:
        raise CheckpointError(f"{str(folder.parent)!r} cannot be written ({error.strerror})") from None
    finally:
        if unfinished:
            shutil.rmtree(unfinished, ignore_errors=True)


def _clear_remains(folder: Path) -> None:
    """Removes what killed processes left. A running one holds a lock."""
    for remains in folder.parent.glob(f".{folder.name}-*"):
        with suppress(OSError), exclusive(remains):
            shutil.rmtree(remains)


def _check_space(folder: Path, size_bytes: int, what: str) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < size_bytes + RESERVE_BYTES:
        sizes = f"{size_bytes / 1e9:.1f} GB, but the disk has {free_bytes / 1e9:.1f} GB free"
        raise CheckpointError(f"{what} take {sizes}: make room, or use a smaller dtype")


def flush(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk: a power cut then leaves no empty file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_in_place(unfinished: Path, folder: Path) -> None:
    unfinished.chmod(0o755)
    for path in (*unfinished.iterdir(), unfinished):
        flush(path)
    if not folder.exists():
        unfinished.rename(folder)
        flush(folder.parent)
        return
    replaced = unfinished.with_name(unfinished.name + "-replaced")
    try:
        with exclusive(folder):
            folder.rename(replaced)
            unfinished.rename(folder)
    except BlockingIOError:
        raise FolderInUseError(f"{str(folder)!r} is in use by a running server: stop it first") from None
    shutil.rmtree(replaced, ignore_errors=True)
