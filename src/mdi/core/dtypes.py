"""The dtypes that the model is computed in, and their names in options, configs and messages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mdi.core.errors import CheckpointError

if TYPE_CHECKING:  # torch takes seconds to import, and names of dtypes do not need it
    import torch

DTYPE_NAMES = ("float32", "bfloat16", "float16")


def parse_dtype(name: str) -> torch.dtype:
    """The dtype of this name. Raises CheckpointError for a dtype that the model is not computed in."""
    import torch

    if name not in DTYPE_NAMES:
        raise CheckpointError(f"dtype {name!r} is not supported: use one of {', '.join(DTYPE_NAMES)}")
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype, without the prefix `torch.`."""
    return str(dtype).removeprefix("torch.")
