"""Locks on folders: shared while a folder is used, exclusive while it is written, replaced or removed.

They belong to a process and end with it. Where a file system has no locks, every lock is granted.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


class Hold:
    """A shared lock on a folder: nothing replaces or removes the folder until `close`.

    Waits while something does. Raises FileNotFoundError when the folder is not there, or is another one by then.
    """

    def __init__(self, folder: Path) -> None:
        self._descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            _lock(self._descriptor, fcntl.LOCK_SH)
            if not os.path.samestat(os.fstat(self._descriptor), folder.stat()):
                raise FileNotFoundError(errno.ENOENT, "the folder was replaced", str(folder))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Safe to call twice."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Raises BlockingIOError when the folder is locked already."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def in_use(folder: Path) -> bool:
    """Whether a process holds a lock on the folder."""
    try:
        with exclusive(folder):
            return False
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False


def _lock(descriptor: int, kind: int) -> None:
    try:
        fcntl.flock(descriptor, kind)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
