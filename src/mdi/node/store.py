"""A node's chunks in the cache folder: one entry for each manifest, by its digest.

A chunk that is being received is a file of its own that grows; a transfer goes on where the last one stopped. No
chunk is trusted: each is checked whenever it is loaded.
"""

from __future__ import annotations

import errno
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from mdi.checkpoint.cache import FOLDER_OPTION, Cache
from mdi.checkpoint.locks import Hold
from mdi.checkpoint.manifest import ChunkEntry, Manifest, chunk_file
from mdi.checkpoint.new_folder import flush
from mdi.core.errors import CheckpointError


class ChunkStore:
    """The chunks that a node was sent. Locks the entry of the last one that was prepared."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self._held: Hold | None = None

    def chunk(self, manifest: Manifest, role: str) -> StoredChunk:
        """The place of a role's chunk. Raises CheckpointError when the manifest has no such chunk."""
        return StoredChunk(self, manifest, manifest.chunk(chunk_file(role)))

    def hold(self, manifest: Manifest) -> None:
        """Makes and locks the entry of a manifest, and releases the one that was locked before."""
        held, self._held = self._held, self.cache.hold(manifest.digest)
        if held:
            held.close()

    def close(self) -> None:
        """Releases the entry. Safe to call twice."""
        if self._held:
            self._held.close()


class StoredChunk:
    """The place of one chunk. Methods raise CheckpointError, with the remedy, when the disk refuses."""

    def __init__(self, store: ChunkStore, manifest: Manifest, entry: ChunkEntry) -> None:
        self.entry = entry
        self.manifest = manifest
        self._store = store
        self._folder = store.cache.folder / manifest.digest
        self._growing = self._folder / f".{entry.file}.part"

    @property
    def path(self) -> Path:
        """Its file, once it is complete."""
        return self._folder / self.entry.file

    @property
    def complete(self) -> bool:
        """Whether all bytes are there; they may be damaged."""
        return _size(self.path) == self.entry.size_bytes

    @property
    def have_bytes(self) -> int:
        """How many of its first bytes are there while it is not complete."""
        return _size(self._growing)

    def prepare(self) -> None:
        """Makes ready to receive what is missing: a locked entry with the manifest, and room for the rest.

        Removes files of a wrong size. Raises CheckpointError when the rest does not fit.
        """
        with self._translated():
            self._store.hold(self.manifest)
            self.manifest.write(self._folder)
            if self.complete:
                return
            self.path.unlink(missing_ok=True)
            if self.have_bytes > self.entry.size_bytes:
                self._growing.unlink()
            self._store.cache.make_room(self.entry.size_bytes - self.have_bytes)

    @contextmanager
    def growing(self) -> Iterator[FileIO]:
        """The file to append to, for one process at a time."""
        with self._translated(), self._growing.open("ab", buffering=0) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CheckpointError(
                    f"another process is receiving {self.entry.file} into {str(self._store.cache.folder)!r}: "
                    f"end it, or choose another folder with {FOLDER_OPTION}"
                ) from None
            yield file

    def finish(self) -> None:
        """Gives the file its name: all bytes are there, and on the disk."""
        with self._translated():
            flush(self._growing)
            self._growing.replace(self.path)
            flush(self._folder)

    def discard(self) -> None:
        """Removes what is there."""
        with self._translated():
            self.path.unlink(missing_ok=True)
            self._growing.unlink(missing_ok=True)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckpointError(f"the chunk cannot be kept: {_cause(error, self._store.cache.folder)}") from None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _cause(error: OSError, folder: Path) -> str:
    other = f"choose another folder with {FOLDER_OPTION}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk of {str(folder)!r} is full ({error.strerror}): make room (see `mdi cache ls`), or {other}"
    return f"{str(folder)!r} cannot be written ({error.strerror}): {other}"
