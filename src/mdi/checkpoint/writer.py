"""Writes safetensors files tensor by tensor. Knows the file format, nothing of models and plans.

The library's own writer needs all tensors in memory, which are gigabytes for a chunk.
Format: eight bytes of header length (little-endian), a JSON header of name -> dtype, shape, offsets, then the
raw data (github.com/huggingface/safetensors, README).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor

from mdi.checkpoint.tensor_file import DTYPES, INTEGERS
from mdi.core.dtypes import parse_dtype
from mdi.core.tensors import Specs, TensorSpec

CODES = {name: code for code, name in DTYPES.items()}
ALIGNMENT = 64


class SafetensorsWriter:
    """A file that is written tensor by tensor, each cast to its dtype. Call `close`, whatever happens."""

    def __init__(
        self,
        path: Path,
        specs: Specs,
        metadata: Mapping[str, str],
        progress: Callable[[int], None] = lambda _: None,
    ) -> None:
        """specs: as the file stores them. progress: called with the bytes of each tensor written."""
        header = safetensors_header(specs, metadata)
        self._left = iter(specs.values())
        self._progress = progress
        self._digest = hashlib.sha256(header)
        self._file = path.open("wb")
        self._file.write(header)

    def write(self, tensor: Tensor) -> None:
        """The next one, in the order of the specs."""
        data = _cast(tensor, next(self._left)).contiguous().flatten().view(torch.uint8).numpy().data
        self._file.write(data)
        self._digest.update(data)
        self._progress(data.nbytes)

    @property
    def sha256(self) -> str:
        """Of what is written by now, hexadecimal."""
        return self._digest.hexdigest()

    @property
    def size_bytes(self) -> int:
        """Of what is written by now."""
        return self._file.tell()

    def close(self) -> None:
        self._file.close()


def write_safetensors(
    path: Path,
    specs: Specs,
    tensors: Iterable[Tensor],
    metadata: Mapping[str, str],
    progress: Callable[[int], None] = lambda _: None,
) -> tuple[str, int]:
    """Writes a whole file, and keeps one tensor at a time in memory: each is read or made when it is asked for.

    tensors: in the order of specs. The other arguments are those of `SafetensorsWriter`.
    Returns the sha256 (hexadecimal) and size in bytes.
    """
    with closing(SafetensorsWriter(path, specs, metadata, progress)) as file:
        for tensor in tensors:
            file.write(tensor)
            del tensor  # before the next one is made
        return file.sha256, file.size_bytes


def _cast(tensor: Tensor, spec: TensorSpec) -> Tensor:
    return tensor if spec.dtype in INTEGERS else tensor.to(parse_dtype(spec.dtype))


def safetensors_header(specs: Specs, metadata: Mapping[str, str]) -> bytes:
    """What stands before the data of a file, its length included. specs: in the order of the data."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, spec in specs.items():
        end = offset + spec.size_bytes
        entries[name] = {"dtype": CODES.get(spec.dtype, spec.dtype), "shape": spec.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
