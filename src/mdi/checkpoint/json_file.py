"""The JSON files of a checkpoint, and what is said of a file that cannot be used."""

from __future__ import annotations

import errno
import json
import stat
from pathlib import Path
from typing import Any, NoReturn

from mdi.core.errors import CheckpointError

LFS_POINTER = b"version https://git-lfs"  # the first bytes of a file that Git LFS has not fetched


def read_json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    """The object in a JSON file. optional: {} where there is no such file.

    Raises CheckpointError, with the file and the remedy, when the file is missing or damaged.
    """
    data = read_file(path, optional=optional)
    if data is None:
        return {}
    try:
        content = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
        if rb"\ud" in data.lower():  # perhaps half of a surrogate pair, which is no text
            json.dumps(content, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path.name} is not a valid JSON object: download it again")
    return content


def read_file(path: Path, *, optional: bool = False) -> bytes | None:
    """The bytes of a file. optional: None where there is no such file.

    Raises CheckpointError, with the file and the remedy, when it is missing, unreadable or a Git LFS pointer.
    """
    try:
        if stat.S_ISFIFO(path.stat().st_mode):  # reading it would wait for ever
            raise OSError(errno.EINVAL, "it is a pipe")
        data = path.read_bytes()
    except FileNotFoundError:
        if path.is_symlink():
            raise CheckpointError(f"{str(path)!r} is a link to a file that is gone: download it again") from None
        if optional:
            return None
        raise CheckpointError(
            f"{path.parent.name} has no {path.name}: it is not a checkpoint in Hugging Face layout, "
            "or its download is not complete"
        ) from None
    except OSError as error:
        raise _unreadable(path, error) from None
    if data.startswith(LFS_POINTER):
        raise lfs_pointer(path)
    return data


def refuse_damaged(path: Path) -> NoReturn:
    """Raises CheckpointError for a file that a library could not open: what is wrong with it, and the remedy."""
    try:
        with path.open("rb") as file:
            start = file.read(len(LFS_POINTER))
    except OSError as error:
        raise _unreadable(path, error) from None
    if start == LFS_POINTER:
        raise lfs_pointer(path)
    raise CheckpointError(f"{path.name} is damaged or missing: download or convert it again")


def lfs_pointer(path: Path) -> CheckpointError:
    """The error for a file that holds Git LFS's pointer in place of the content."""
    return CheckpointError(
        f"{path.name} is a Git LFS pointer, not the file itself: run `git lfs pull` in {str(path.parent)!r}, "
        "or download it again"
    )


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    remedy = (
        "download it again" if isinstance(error, (IsADirectoryError, FileNotFoundError)) else "check its permissions"
    )
    return CheckpointError(f"{str(path)!r} cannot be read ({error.strerror}): {remedy}")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
