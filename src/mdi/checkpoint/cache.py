"""The user's cache folder: chunks that nodes received, and what cannot be written beside a checkpoint.

Each entry is a subfolder. Its modification time says when it was last used; a lock on it says that it is in use.
"""

from __future__ import annotations

import os
import shutil
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from mdi.checkpoint.json_file import read_json
from mdi.checkpoint.locks import Hold, exclusive, in_use
from mdi.core.errors import CheckpointError, ConfigError
from mdi.core.quantization import ModelQuantization, described

FOLDER_OPTION = "--cache-folder"
LIMIT_VARIABLE = "MDI_CACHE_GB"
DEFAULT_LIMIT_GB = 100.0
RESERVE_BYTES = 64 * 2**20  # of every disk, left free


def default_cache_folder() -> Path:
    """`mdi/chunks` in the user's cache folder (XDG_CACHE_HOME, or .cache). Raises ConfigError without a home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mdi" / "chunks"
    except RuntimeError:
        raise ConfigError(f"this user has no home folder to keep chunks in: choose one with {FOLDER_OPTION}") from None


def limit_from_environment() -> int:
    """The most bytes in the cache folder, from MDI_CACHE_GB. Raises ConfigError unless that is a number above 0."""
    text = os.environ.get(LIMIT_VARIABLE) or DEFAULT_LIMIT_GB
    try:
        limit_gb = float(text)
    except ValueError:
        limit_gb = 0.0
    if not 0 < limit_gb < float("inf"):
        raise ConfigError(f"{LIMIT_VARIABLE} is the size of the cache folder in GB, a number above 0, not {text!r}")
    return int(limit_gb * 1e9)


@dataclass(frozen=True)
class CacheEntry:
    """A subfolder of the cache. used_s: when it was last used, in seconds of the Unix epoch."""

    folder: Path
    size_bytes: int
    used_s: float

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def contents(self) -> str:
        """The model, and what of it is there: chunks with their numeric types, or a checkpoint."""
        try:
            manifest = read_json(self.folder / "manifest.json")
            roles = [path.stem.removeprefix("model_") for path in sorted(self.folder.glob("model_*.safetensors"))]
            numbers = described(manifest["dtype"], ModelQuantization(**manifest["quantization"]))
            return f"{manifest['model']}, {numbers}: {', '.join(roles) or 'unfinished'}"
        except (CheckpointError, ConfigError, KeyError, TypeError):
            return "checkpoint" if (self.folder / "config.json").exists() else "unfinished"

    @property
    def in_use(self) -> bool:
        return any(map(in_use, self._locked))

    @property
    def _locked(self) -> list[Path]:
        """The folders whose locks count: its own, and those of chunks beside a random checkpoint."""
        return [self.folder, *self.folder.glob("chunks/*/")]

    def remove(self) -> bool:
        """Removes it, unless it is in use; whether it is gone."""
        try:
            with ExitStack() as locks:
                for folder in self._locked:
                    locks.enter_context(exclusive(folder))
                shutil.rmtree(self.folder)
        except FileNotFoundError:  # another process removed it
            return True
        except OSError:
            return not self.folder.exists()
        return True


@dataclass(frozen=True)
class Cache:
    """A folder of entries, and the most bytes that they may take together."""

    folder: Path
    limit_bytes: int

    @classmethod
    def open(cls, folder: Path | None = None) -> Cache:
        """The user's cache, or the one in another folder, with the limit from the environment."""
        return cls(folder or default_cache_folder(), limit_from_environment())

    def __str__(self) -> str:
        return f"the cache folder {str(self.folder)!r}"

    def check(self) -> None:
        """Raises ConfigError unless something can be written into it."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{self} cannot be made ({error.strerror}): {_OTHER}") from None
        if not os.access(self.folder, os.W_OK | os.X_OK):
            raise ConfigError(f"nothing can be written into {self}: make it writable, or {_OTHER}")

    def entries(self) -> list[CacheEntry]:
        """All entries, the least recently used first. Unfinished ones have a name that begins with a dot."""
        found = []
        with suppress(FileNotFoundError):
            for folder in self.folder.iterdir():
                with suppress(OSError):  # removed meanwhile
                    if folder.is_dir():
                        found.append(CacheEntry(folder, folder_bytes(folder), folder.stat().st_mtime))
        return sorted(found, key=lambda entry: entry.used_s)

    def hold(self, name: str) -> Hold:
        """Makes the entry if there is none, locks it and marks it as used. Raises OSError when the disk refuses."""
        folder = self.folder / name
        while True:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with suppress(FileNotFoundError):  # it was removed in between
                hold = Hold(folder)
                mark_used(folder)
                return hold

    def make_room(self, size_bytes: int) -> None:
        """Removes least recently used entries, but none in use, until so many bytes more fit.

        Raises CheckpointError, with the remedy, when they do not fit even then.
        """
        entries = self.entries()
        total_bytes = sum(entry.size_bytes for entry in entries)
        free_bytes = shutil.disk_usage(self.folder).free
        excess = max(total_bytes + size_bytes - self.limit_bytes, size_bytes + RESERVE_BYTES - free_bytes)
        unused = [entry for entry in entries if excess > 0 and not entry.in_use]
        if excess <= sum(entry.size_bytes for entry in unused):
            for entry in unused:
                if excess > 0 and entry.remove():
                    excess -= entry.size_bytes
        if excess > 0:
            raise CheckpointError(self._does_not_fit(size_bytes, total_bytes, free_bytes))

    def _does_not_fit(self, size_bytes: int, total_bytes: int, free_bytes: int) -> str:
        if size_bytes + RESERVE_BYTES > free_bytes:
            sizes = f"{_gb(size_bytes)} are missing, {_gb(free_bytes)} are free"
            return f"the disk of {self} is full ({sizes}): make room (see `mdi cache ls`), or {_OTHER}"
        sizes = f"it is limited to {_gb(self.limit_bytes)} and holds {_gb(total_bytes)}"
        return f"{_gb(size_bytes)} do not fit into {self}: {sizes}, in use. Raise {LIMIT_VARIABLE}, or {_OTHER}"


def mark_used(folder: Path) -> None:
    """Makes an entry the most recently used one, where its folder can be written."""
    with suppress(OSError):
        os.utime(folder)


def folder_bytes(folder: Path) -> int:
    """Bytes of all files in a folder and its subfolders."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            total += path.lstat().st_size if path.is_file() else 0
    return total


def _gb(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.1f} GB"


_OTHER = f"choose another folder with {FOLDER_OPTION}"
