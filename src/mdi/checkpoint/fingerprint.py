"""What a checkpoint's files were when chunks were made of them, so that chunks of other weights are noticed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from mdi.checkpoint.source import Source
from mdi.core.progress import Progress, counter

HASH_BLOCK = 16 * 2**20


class SourceFile(BaseModel):
    """A file of a checkpoint. sha256: of its content, hexadecimal."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    size_bytes: int
    mtime_ns: int
    sha256: str


class Fingerprint:
    """A checkpoint's files as they are now. A file is read only where size and modification time do not decide.

    progress: called with the bytes of the files that are read.
    """

    def __init__(self, source: Source, progress: Progress | None = None) -> None:
        self._paths = {_name(path, source.path): path for path in source.files}
        self._stats = self._measure()
        self._progress = progress
        self._sha256: dict[str, str] = {}

    def matches(self, recorded: Sequence[SourceFile]) -> bool:
        """Whether the files have the content that they had when they were recorded."""
        return self._paths.keys() == {file.name for file in recorded} and all(map(self._is_same, recorded))

    def record(self) -> tuple[SourceFile, ...]:
        """All files, to be compared later."""
        return tuple(
            SourceFile(name=name, size_bytes=size, mtime_ns=mtime, sha256=self._hash(name))
            for name, (size, mtime) in self._stats.items()
        )

    def changed(self) -> bool:
        """Whether a file was changed since this object was made."""
        return self._measure() != self._stats

    def _is_same(self, file: SourceFile) -> bool:
        size_bytes, mtime_ns = self._stats[file.name]
        if size_bytes != file.size_bytes:
            return False
        if mtime_ns == file.mtime_ns:
            self._sha256[file.name] = file.sha256
            return True
        return self._hash(file.name) == file.sha256

    def _measure(self) -> dict[str, tuple[int, int]]:
        stats = {name: path.stat() for name, path in self._paths.items()}
        return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}

    def _hash(self, name: str) -> str:
        if name not in self._sha256:
            count = counter(self._progress, f"checking {name}", self._stats[name][0])
            self._sha256[name] = hash_file(self._paths[name], count)
        return self._sha256[name]


def _name(path: Path, folder: Path) -> str:
    """A file of another folder, an adapter's, has its own name alone."""
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else path.name


def hash_file(path: Path, count: Callable[[int], None]) -> str:
    """The sha256 of a file, hexadecimal. count: called with the bytes of every block that was read."""
    digest = hashlib.sha256()
    block = memoryview(bytearray(HASH_BLOCK))
    with path.open("rb", buffering=0) as file:
        while n_bytes := file.readinto(block):
            digest.update(block[:n_bytes])
            count(n_bytes)
    return digest.hexdigest()
