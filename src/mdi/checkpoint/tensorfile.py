"""Writes safetensors files one tensor at a time. Knows the file format, nothing of models, plans or checkpoints.

The safetensors library wants all tensors of a file in memory at once, which for a stage of several GB is twice what this
machine should need. The format is small: the header's length (8 bytes, little endian), the header (JSON: dtype, shape and
byte range of each tensor), the raw data (https://github.com/huggingface/safetensors, section Format). Files are read with
the library.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from mdi.errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""The precisions a model runs in, by the name users and config files give them."""

_CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_ALIGNMENT = 64  # the data starts at a multiple of a cache line
_PIECE_BYTES = 8 << 20


class Sink(Protocol):
    """Anything bytes can be written to."""

    def write(self, data: bytes | memoryview, /) -> object: ...


def torch_dtype(name: str) -> torch.dtype:
    """The dtype called `name`. Raises ConfigError for others than float32, bfloat16 and float16."""
    if name not in DTYPES:
        raise ConfigError(f"dtype {name!r} is not supported; supported: {', '.join(DTYPES)}")
    return DTYPES[name]


def data_bytes(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> int:
    """Bytes of these tensors without the file's header."""
    return sum(map(math.prod, shapes.values())) * dtype.itemsize


def write_tensors(
    sink: Sink,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    get: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a whole safetensors file into `sink`, in the order of `shapes`, all in one dtype.

    get: name -> tensor on the CPU of that shape and dtype; asked for one at a time and dropped before the next.
    """
    sink.write(_header(shapes, dtype, metadata or {}))
    for name, shape in shapes.items():
        tensor = get(name)
        assert (tuple(tensor.shape), tensor.dtype) == (tuple(shape), dtype), name
        _write_data(sink, tensor)


def _header(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _write_data(sink: Sink, tensor: Tensor) -> None:
    data = memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    for start in range(0, len(data), _PIECE_BYTES):
        sink.write(data[start : start + _PIECE_BYTES])
