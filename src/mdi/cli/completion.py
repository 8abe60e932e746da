"""Values that a shell completes: the choices of an option, and checkpoints. What shells ask imports nothing slow.

Where nothing of ours fits, the shell completes names of files.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import typer

from mdi.checkpoint.bundled import BUNDLED
from mdi.checkpoint.published import PUBLISHED

CONFIG = "config.json"  # what makes a folder a checkpoint
MOST_FOLDERS = 1000  # that are looked into, so that a shell answers at once


def words(known: Sequence[str]) -> Callable[[str], list[str]]:
    """Completes one of these words."""

    def complete(incomplete: str) -> list[str]:
        return [word for word in known if word.startswith(incomplete)]

    return complete


def checkpoints(ctx: typer.Context, incomplete: str) -> list[str]:
    """Completes what a checkpoint is named by: its own name, or its folder."""
    named = [BUNDLED, *(f"random:{name}" for name in PUBLISHED)]
    downloads = Path(ctx.params.get("ckpt_folder") or "")
    named += [str(folder.relative_to(downloads)) for folder in _checkpoints(downloads, "")]
    found = words(named)(incomplete)
    parent, name = os.path.split(incomplete)
    found += [os.path.join(parent, folder) for folder in _names(Path(parent).expanduser(), name)]  # noqa: PTH118 - ./x
    return sorted({place for place in found if not any(letter.isspace() for letter in place)})


def _names(parent: Path, beginning: str) -> Iterator[str]:
    for folder in _checkpoints(parent, beginning):
        yield str(folder.relative_to(parent))


def _checkpoints(parent: Path, beginning: str) -> Iterator[Path]:
    """Checkpoints in folders whose names begin so, and one level below, as owner/name is."""
    looked = 0
    for folder in _folders(parent, beginning):
        for place in (folder, *_folders(folder, "")):
            looked += 1
            if looked > MOST_FOLDERS:
                return
            if (place / CONFIG).is_file():
                yield place


def _folders(parent: Path, beginning: str) -> list[Path]:
    """The folders in a folder, without hidden ones unless their first letters are given."""
    try:
        with os.scandir(parent) as entries:
            names = [entry.name for entry in entries if entry.name.startswith(beginning) and entry.is_dir()]
    except OSError:
        return []
    return [parent / name for name in sorted(names) if beginning or not name.startswith(".")]
