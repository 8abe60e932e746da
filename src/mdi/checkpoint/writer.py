"""Writes safetensors files tensor by tensor. Knows the file format, nothing of models and plans.

The library's own writer wants all tensors at once, which for a chunk of gigabytes means holding it in memory.
Format: eight bytes of header length (little-endian), a JSON header of name -> dtype, shape, offsets, then the
raw data (github.com/huggingface/safetensors, README).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from mdi.models.weights import Shapes

DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
ALIGNMENT = 64


def write_safetensors(
    path: Path,
    shapes: Shapes,
    dtype: torch.dtype,
    get: Callable[[str], Tensor],
    metadata: Mapping[str, str],
    progress: Callable[[int], None] = lambda _: None,
) -> tuple[str, int]:
    """Writes tensors of one dtype in the order of `shapes`, asking `get` for each when its turn comes.

    progress: told the bytes of every tensor written. Returns the sha256 (hexadecimal) and size in bytes.
    """
    digest, header = hashlib.sha256(), _header(shapes, dtype, metadata)
    with path.open("wb") as file:
        file.write(header)
        digest.update(header)
        for name in shapes:
            data = get(name).to(dtype).contiguous().flatten().view(torch.uint8).numpy().data
            file.write(data)
            digest.update(data)
            progress(data.nbytes)
            del data  # before the next one is made
        return digest.hexdigest(), file.tell()


def _header(shapes: Shapes, dtype: torch.dtype, metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, shape in shapes.items():
        end = offset + prod(shape) * dtype.itemsize
        entries[name] = {"dtype": DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
