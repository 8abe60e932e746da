"""The contents of GGUF files: their entries, and their tensors as they are stored.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Files come from strangers: every size is compared
with the bytes that are there before anything is read or allocated.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize
from torch import Tensor

from mdi.checkpoint.json_file import LFS_POINTER, lfs_pointer
from mdi.core.errors import CheckpointError

SUFFIX = ".gguf"
PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
VERSIONS = (2, 3)
NUMBERS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}
LEAST_ENTRY_BYTES, LEAST_TENSOR_BYTES = 13, 24  # of the header, with empty names
MAX_DIMENSIONS = 4


@dataclass(frozen=True)
class GgufTensor:
    """One tensor as it is stored. shape: outputs first, as on the hub. kind: the name of llama.cpp's type.

    rows: uint8 [all dimensions but the last, bytes of a row], mapped from the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    rows: npt.NDArray[np.uint8]

    def floats(self) -> Tensor:
        """Dequantised: float32, of its shape. Raises CheckpointError for a type that holds no weights."""
        try:
            made = dequantize(self.rows, GGMLQuantizationType[self.kind])
        except NotImplementedError:
            raise CheckpointError(f"the tensor {self.name} is stored as {self.kind}, which is not supported") from None
        return torch.from_numpy(np.array(made, np.float32, copy=True)).view(self.shape)

    def stacked(self) -> list[GgufTensor]:
        """The matrices that lie one after the other in it, one for each expert; mapped like it."""
        count, *shape = self.shape
        return [
            GgufTensor(f"{self.name}[{index}]", tuple(shape), self.kind, rows)
            for index, rows in enumerate(self.rows.reshape(count, -1, self.rows.shape[-1]))
        ]


@dataclass(frozen=True)
class GgufFile:
    """entries: by name, arrays as lists. tensors: by name, in the order of the file."""

    name: str
    entries: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    @classmethod
    def read(cls, path: Path) -> GgufFile:
        """Maps a file. Raises CheckpointError, with its name, for one that is no GGUF file, damaged or cut off."""
        name = path.resolve().name
        try:
            with path.open("rb") as file:
                start = file.read(len(LFS_POINTER))
                if start == LFS_POINTER:
                    raise lfs_pointer(path)
                if start[:4] != b"GGUF":
                    raise CheckpointError(f"{name} is no GGUF file: download it again")
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CheckpointError(f"{name} cannot be read ({error.strerror})") from None
        try:
            return cls(name, *_Header(data).contents())
        except (_DamageError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{name} is damaged or cut off ({error}): download it again") from None


def parts_of(file: Path) -> list[Path]:
    """The files of a model that is split over several, by the first of them; else the file alone.

    Raises CheckpointError for another part than the first, and where one is missing.
    """
    named = PART.fullmatch(file.name)
    if named is None:
        return [file]
    stem, number, count = named[1], int(named[2]), int(named[3])
    files = [file.with_name(f"{stem}-{index:05}-of-{count:05}.gguf") for index in range(1, count + 1)]
    if number != 1:
        raise CheckpointError(f"{file.name} is part {number} of {count}: name the first one, {files[0].name}")
    if missing := next((part.name for part in files if not part.is_file()), None):
        raise CheckpointError(f"{missing} is missing beside {file.name}: download all {count} parts")
    return files


def read_parts(files: Sequence[Path]) -> GgufFile:
    """One model of all its files, with the entries of the first. Raises CheckpointError where they do not belong."""
    parts = [GgufFile.read(file) for file in files]
    first, tensors = parts[0], dict[str, GgufTensor]()
    for index, part in enumerate(parts):
        place = int(part.entries.get("split.no", 0)), int(part.entries.get("split.count", 0)) or 1
        if place != (index, len(parts)):
            raise CheckpointError(
                f"{part.name} is part {place[0] + 1} of {place[1]}, not {index + 1} of {len(parts)}: "
                "keep the names that the parts were published with, NAME-00001-of-0000N.gguf"
            )
        if again := tensors.keys() & part.tensors.keys():
            raise CheckpointError(f"{part.name} has the tensor {min(again)} of an earlier part: download it again")
        tensors |= part.tensors
    if len(tensors) != (count := int(first.entries.get("split.tensors.count", len(tensors)))):
        raise CheckpointError(
            f"the parts of {first.name} have {len(tensors)} tensors, not {count}: download them again"
        )
    return GgufFile(first.name, first.entries, tensors)


class _DamageError(ValueError):
    """A file contradicts itself or ends too early."""


class _Header:
    """Reads the values of a file's header one after the other."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._place = 4

    def contents(self) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
        if (version := self._number("I")) not in VERSIONS:
            raise _DamageError(f"its version is {version}, not one of {', '.join(map(str, VERSIONS))}")
        n_tensors, n_entries = self._count(LEAST_TENSOR_BYTES), self._count(LEAST_ENTRY_BYTES)
        entries = dict[str, Any]()
        for _ in range(n_entries):
            name = self._text()
            entries[name] = self._value(self._number("I"))
        described = [self._tensor() for _ in range(n_tensors)]
        alignment = entries.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise _DamageError(f"its alignment is {alignment!r}")
        start = -(-self._place // alignment) * alignment
        tensors = {name: self._mapped(name, shape, kind, start + offset) for name, shape, kind, offset in described}
        if len(tensors) != n_tensors:
            raise _DamageError("two tensors have one name")
        return entries, tensors

    def _take(self, size: int) -> bytes:
        end = self._place + size
        if end > len(self._data):
            raise _DamageError("it ends too early")
        taken, self._place = self._data[self._place : end], end
        return taken

    def _number(self, code: str) -> Any:
        return struct.unpack("<" + code, self._take(struct.calcsize("<" + code)))[0]

    def _count(self, least_bytes: int) -> int:
        """A number of things that follow, of so many bytes each at least."""
        count = int(self._number("Q"))
        if count * least_bytes > len(self._data):
            raise _DamageError(f"it says that it has {count} of something, which do not fit")
        return count

    def _text(self) -> str:
        return self._take(self._count(1)).decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind == GGUFValueType.STRING:
            return self._text()
        if kind == GGUFValueType.ARRAY:
            return self._array(self._number("I"))
        number = self._number(_code(kind))
        return _decimal(number) if kind == GGUFValueType.FLOAT32 else number

    def _array(self, kind: int) -> list[Any]:
        if kind == GGUFValueType.STRING:
            return [self._text() for _ in range(self._count(8))]
        code = _code(kind)
        count = self._count(struct.calcsize("<" + code))
        numbers = struct.unpack(f"<{count}{code}", self._take(count * struct.calcsize("<" + code)))
        return [_decimal(number) for number in numbers] if kind == GGUFValueType.FLOAT32 else list(numbers)

    def _tensor(self) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
        """Name, shape, type and where it begins."""
        name, dimensions = self._text(), self._number("I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise _DamageError(f"{name} has {dimensions} dimensions")
        shape = tuple(int(self._number("Q")) for _ in range(dimensions))[::-1]
        kind = self._number("I")
        if kind not in GGMLQuantizationType.__members__.values():
            raise _DamageError(f"{name} has the unknown type {kind}")
        return name, shape, GGMLQuantizationType(kind), int(self._number("Q"))

    def _mapped(self, name: str, shape: tuple[int, ...], kind: GGMLQuantizationType, start: int) -> GgufTensor:
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if min(shape) < 1 or shape[-1] % block:
            raise _DamageError(f"{name} has the shape {list(shape)}, of which {kind.name} has no whole blocks")
        row_bytes, n_rows = shape[-1] // block * block_bytes, math.prod(shape[:-1])
        if start + n_rows * row_bytes > len(self._data):
            raise _DamageError(f"it ends before the end of {name}")
        rows = np.frombuffer(self._data, np.uint8, n_rows * row_bytes, start).reshape(n_rows, row_bytes)
        return GgufTensor(name, shape, kind.name, rows)


def _decimal(number: float) -> float:
    """The shortest decimal that is this number in float32: what was written, most likely."""
    return float(str(np.float32(number)))


def _code(kind: int) -> str:
    """Of `struct`, for a type of numbers."""
    if kind not in NUMBERS:
        raise _DamageError(f"it has an entry of the unknown type {kind}")
    return NUMBERS[GGUFValueType(kind)]
