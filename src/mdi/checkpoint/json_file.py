"""The JSON files of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mdi.core.errors import CheckpointError


def read_json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    """The object in a JSON file. optional: {} where there is no such file.

    Raises CheckpointError, with the file and the remedy, when the file is missing or damaged.
    """
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        if optional:
            return {}
        raise CheckpointError(
            f"{path.parent.name} has no {path.name}: it is not a checkpoint in Hugging Face layout"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{str(path)!r} cannot be read ({error.strerror}): check its permissions") from None
    except (ValueError, TypeError):
        raise CheckpointError(f"{path.name} is not a valid JSON object: download it again") from None
