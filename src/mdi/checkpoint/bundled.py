"""The small trained Qwen2-VL that ships with the package. `training/` in the repository made it."""

from __future__ import annotations

import filecmp
import shutil
import tempfile
from pathlib import Path

from mdi.core.errors import CheckpointError

BUNDLED = "bundled"
SHIPPED = Path(__file__).parents[1] / "assets" / BUNDLED


def unpack(folder: Path) -> Path:
    """Copies the bundled checkpoint to `folder`, unless a copy is there. Returns `folder`.

    A copy that differs from this release is replaced, with its chunks. Raises CheckpointError when the copy cannot be
    written.
    """
    if _is_copy(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as unfinished:
            copy = Path(unfinished) / folder.name
            copy.mkdir()
            for name in _names():
                shutil.copy2(SHIPPED / name, copy)
            shutil.rmtree(folder, ignore_errors=True)
            copy.rename(folder)
    except OSError as error:
        if not _is_copy(folder):  # another process has written it
            cause = error.strerror or "it cannot be written"
            raise CheckpointError(
                f"the bundled model cannot be copied to {str(folder)!r} ({cause}): choose another --ckpt-folder"
            ) from None
    return folder


def _is_copy(folder: Path) -> bool:
    same, _, _ = filecmp.cmpfiles(SHIPPED, folder, _names(), shallow=False)
    return len(same) == len(_names())


def _names() -> list[str]:
    return [path.name for path in SHIPPED.iterdir() if path.is_file()]
