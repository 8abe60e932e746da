"""A safetensors file whose header is read once, however many tensors it has.

The library reads the header for each tensor that is asked for: with the thousands of a mixture of experts, hours.
Format: eight bytes of header length (little-endian), a JSON header of name -> dtype, shape, offsets, then the raw data
(github.com/huggingface/safetensors, README).
"""

from __future__ import annotations

import json
import mmap
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from mdi.core.tensors import Specs, TensorSpec

DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
INTEGERS = {"I8": torch.int8, "U8": torch.uint8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64}


@dataclass(frozen=True)
class TensorFile:
    """A file's tensors, each mapped by itself: what a model copies is not resident twice.

    metadata: of the header. specs: in the order of the header. begins: of the data of each, in bytes from the start of
    the file.
    """

    path: Path
    metadata: dict[str, str]
    specs: Specs
    begins: dict[str, int]

    @classmethod
    def open(cls, path: Path) -> TensorFile:
        """Raises SafetensorError and OSError, as the library does for a file that is damaged or missing."""
        # Checks that the header is one, and that it describes the whole file. For torch ("pt") it would map the whole
        # file to be written, which the system refuses for more than the machine's memory.
        with safe_open(path, "np"):
            pass
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        metadata = header.pop("__metadata__", None) or {}
        specs = {
            name: TensorSpec(tuple(entry["shape"]), DTYPES.get(entry["dtype"], entry["dtype"]))
            for name, entry in header.items()
        }
        return cls(path, metadata, specs, {name: 8 + size + entry["data_offsets"][0] for name, entry in header.items()})

    def tensor(self, name: str) -> Tensor:
        """One tensor, mapped from the file: its bytes are read when they are used. Raises OSError."""
        spec, begin = self.specs[name], self.begins[name]
        dtype = INTEGERS.get(spec.dtype) or getattr(torch, spec.dtype)
        if spec.size == 0:
            return torch.empty(spec.shape, dtype=dtype)
        before = begin % mmap.ALLOCATIONGRANULARITY
        length = before + spec.size * dtype.itemsize
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            mapped = mmap.mmap(descriptor, length, access=mmap.ACCESS_COPY, offset=begin - before)
        except ValueError as error:  # the file was cut off
            raise OSError(str(error)) from error
        finally:
            os.close(descriptor)
        return torch.frombuffer(mapped, dtype=dtype, count=spec.size, offset=before).view(spec.shape)
