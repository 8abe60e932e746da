"""Where a node keeps chunks it was sent: one folder for each manifest, by its digest. Knows files, no network.

A chunk on its way is a file of its own that grows; whoever goes on asks how far it got. Nothing here is believed:
a chunk is checked whenever it is loaded.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from mdi.checkpoint.manifest import FILE_NAME, ChunkEntry, Manifest, chunk_file
from mdi.checkpoint.prepare import RESERVE_BYTES
from mdi.core.errors import CheckpointError, ConfigError


def default_cache_folder() -> Path:
    """`mdi/chunks` in the user's cache folder (XDG_CACHE_HOME, or .cache). Raises ConfigError without a home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mdi" / "chunks"
    except RuntimeError:
        raise ConfigError("this user has no home folder to keep chunks in: choose one with --cache-folder") from None


@dataclass(frozen=True)
class ChunkCache:
    """A folder of chunks."""

    folder: Path

    def check(self) -> None:
        """Raises ConfigError unless chunks can be kept in it."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"the folder for chunks cannot be made: {_cause(error, self.folder)}") from None
        if not os.access(self.folder, os.W_OK | os.X_OK):
            raise ConfigError(
                f"nothing can be written into {str(self.folder)!r}, where chunks are kept: "
                "make it writable, or choose another with --cache-folder"
            )

    def chunk(self, manifest: Manifest, role: str) -> CachedChunk:
        """A role's chunk, there or not. Raises CheckpointError when the manifest has none."""
        return CachedChunk(self.folder / manifest.digest, manifest, manifest.chunk(chunk_file(role)))


@dataclass(frozen=True)
class CachedChunk:
    """The place of one chunk of one manifest. Methods raise CheckpointError, with the remedy, when the disk refuses."""

    folder: Path
    manifest: Manifest
    entry: ChunkEntry

    @property
    def path(self) -> Path:
        """Where it is, once all of it is there."""
        return self.folder / self.entry.file

    @property
    def _growing(self) -> Path:
        return self.folder / f".{self.entry.file}.part"

    @property
    def complete(self) -> bool:
        """Whether all of it is there; not whether it is undamaged."""
        return _size(self.path) == self.entry.size_bytes

    @property
    def have_bytes(self) -> int:
        """How many of its first bytes are there, when it is not complete."""
        return _size(self._growing)

    def prepare(self) -> None:
        """Makes ready for what is missing: the folder with its manifest, and nothing in it that cannot be right.

        Raises CheckpointError when the rest does not fit on the disk.
        """
        with self._translated():
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._write_manifest()
            if not self.complete:
                self.path.unlink(missing_ok=True)
            if self.have_bytes > self.entry.size_bytes:
                self._growing.unlink()
            free, missing = shutil.disk_usage(self.folder).free, self.entry.size_bytes - self.have_bytes
            if not self.complete and free < missing + RESERVE_BYTES:
                raise OSError(errno.ENOSPC, f"{missing / 1e9:.1f} GB are missing, {free / 1e9:.1f} GB are free")

    @contextmanager
    def growing(self) -> Iterator[FileIO]:
        """The file to append to, for one at a time."""
        with self._translated(), self._growing.open("ab", buffering=0) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CheckpointError(
                    f"another process is receiving {self.entry.file} into {str(self.folder.parent)!r}: "
                    "end it, or choose another folder with --cache-folder"
                ) from None
            yield file

    def finish(self) -> None:
        """Puts the chunk into its place: all bytes are there."""
        with self._translated():
            self._growing.replace(self.path)

    def discard(self) -> None:
        """Removes what is there."""
        with self._translated():
            self.path.unlink(missing_ok=True)
            self._growing.unlink(missing_ok=True)

    def _write_manifest(self) -> None:
        """All of it or nothing: other nodes of this machine write the same."""
        beside = self.folder / f".{self.entry.role}"
        beside.mkdir(exist_ok=True)
        self.manifest.write(beside)
        (beside / FILE_NAME).replace(self.folder / FILE_NAME)
        beside.rmdir()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckpointError(f"the chunk cannot be kept: {_cause(error, self.folder.parent)}") from None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _cause(error: OSError, folder: Path) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy = "make room (chunks of other checkpoints may be there), or choose another folder with --cache-folder"
        return f"the disk of {str(folder)!r} is full ({error.strerror}): {remedy}"
    return f"{str(folder)!r} cannot be written ({error.strerror}): choose another folder with --cache-folder"
