"""Writes safetensors files tensor by tensor. Knows the file format, nothing of models and plans.

The library's own writer needs all tensors in memory, which are gigabytes for a chunk.
Format: eight bytes of header length (little-endian), a JSON header of name -> dtype, shape, offsets, then the
raw data (github.com/huggingface/safetensors, README).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from mdi.checkpoint.safetensors import DTYPES
from mdi.core.dtypes import parse_dtype
from mdi.core.tensors import Specs, TensorSpec

CODES = {name: code for code, name in DTYPES.items()}
INTEGERS = ("I32", "I8", "U8")
ALIGNMENT = 64


def write_safetensors(
    path: Path,
    specs: Specs,
    tensors: Iterable[Tensor],
    metadata: Mapping[str, str],
    progress: Callable[[int], None] = lambda _: None,
) -> tuple[str, int]:
    """Writes tensors, each cast to its dtype, and keeps one at a time in memory.

    specs: as the file stores them. tensors: in that order, each read or made when it is asked for.
    progress: called with the bytes of each tensor written.
    Returns the sha256 (hexadecimal) and size in bytes.
    """
    digest, header = hashlib.sha256(), _header(specs, metadata)
    with path.open("wb") as file:
        file.write(header)
        digest.update(header)
        made = iter(tensors)
        for spec in specs.values():
            data = _cast(next(made), spec).contiguous().flatten().view(torch.uint8).numpy().data
            file.write(data)
            digest.update(data)
            progress(data.nbytes)
            del data  # before the next one is made
        return digest.hexdigest(), file.tell()


def _cast(tensor: Tensor, spec: TensorSpec) -> Tensor:
    return tensor if spec.dtype in INTEGERS else tensor.to(parse_dtype(spec.dtype))


def _header(specs: Specs, metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, spec in specs.items():
        end = offset + spec.size_bytes
        entries[name] = {"dtype": CODES.get(spec.dtype, spec.dtype), "shape": spec.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
