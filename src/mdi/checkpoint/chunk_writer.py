"""Writes the chunks of the ranks of a group together: each weight is read or made once, and cut for all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from mdi.checkpoint.weights import Weights, weight_of
from mdi.checkpoint.writer import SafetensorsWriter
from mdi.core.quantization import QuantizedTensor
from mdi.core.tensors import Specs, stored_specs
from mdi.models.parts import Parts


def write_together(chunks: Sequence[ChunkWriter], weights: Weights) -> None:
    """Writes chunks side by side, with one whole weight in memory, in the order of the first chunk that is unfinished.

    A chunk waits for its next weight until it is that one's: all have the layers, and no two have them in other orders.
    """
    while unfinished := [chunk for chunk in chunks if chunk.names]:
        first = unfinished[0]
        name = first.names[0]
        weight = weight_of(weights, name, first.specs[name])
        for chunk in unfinished:
            if chunk.names[0] == name:
                chunk.write(weight)
        del weight  # before the next one is made


class ChunkWriter:
    """A chunk while it is written. Call `close`, whatever happens.

    specs: its tensors. names: of those that are not written yet, in order.
    """

    def __init__(
        self, path: Path, specs: Specs, parts: Parts, metadata: Mapping[str, str], count: Callable[[int], None]
    ) -> None:
        """parts: what it has of whole weights. count: called with the bytes of each tensor written."""
        self.specs = specs
        self.names = list(specs)
        self._parts = parts
        self._file = SafetensorsWriter(path, stored_specs(specs), metadata, count)

    def write(self, weight: Tensor | QuantizedTensor) -> None:
        """This chunk's part of its next weight, which is given whole."""
        part = self._parts.cut(self.names.pop(0), weight)
        for tensor in part.parts if isinstance(part, QuantizedTensor) else [part]:
            self._file.write(tensor)

    @property
    def sha256(self) -> str:
        """Of what is written by now, hexadecimal."""
        return self._file.sha256

    @property
    def size_bytes(self) -> int:
        """Of what is written by now."""
        return self._file.size_bytes

    def close(self) -> None:
        self._file.close()
