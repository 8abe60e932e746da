"""Nodes: how fast chunks are loaded, against the disk, and the memory that nodes need beyond their chunks."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from statistics import median

from benchmarks.figures import Figure, in_turns, ratio
from benchmarks.formats import Format, engine_settings
from benchmarks.serve_side import serve
from benchmarks.sides import Side
from mdi.checkpoint.loader import load_chunk
from mdi.checkpoint.prepare import Chunks, prepared
from mdi.checkpoint.source import open_source

LOADING = 0.5  # of the disk's rate
ABOVE_MB = 330
PIECE_BYTES = 2**23
TURNS = 3


def chunks_of(path: Path, format_: Format, n_nodes: int) -> Chunks:
    """The checkpoint's chunks in a format, written if they are not there."""
    return prepared(open_source(path), n_nodes, dtype="bfloat16", quantization=format_.quantization)


def loading(chunks: Chunks, format_: Format) -> Figure:
    """Of the chunk of a node that has everything, verified and packed, none of it in the page cache."""
    file = chunks.file("starter")
    with Side("benchmarks.nodes", path=str(file)) as side:
        found = in_turns({name: partial(side.seconds, name) for name in ("read", "load")}, TURNS)
    size = file.stat().st_size
    rates = {name: size / median(seconds) / 1e9 for name, seconds in found.items()}
    here, against = f"{rates['load']:.2f} GB/s", f"the disk gives {rates['read']:.2f} GB/s"
    work = f"loading {size / 1e9:.2f} GB"
    return Figure(format_.name, work, here, against, ratio(found["read"], found["load"]), LOADING)


def memory(path: Path, chunks: Chunks, format_: Format, n_nodes: int) -> Figure:
    """Of the node that needs most beyond its chunk and the KV cache in use, after a question about a picture."""
    settings = {"n_nodes": n_nodes, "dtype": "bfloat16", **engine_settings(format_)}
    with Side("benchmarks.engine_side", path=str(path), settings=settings) as side:
        resident = side.value("resident_after_a_question")
    above = {name: (size - chunks.file(name).stat().st_size) / 1e6 for name, size in resident.items()}
    here = ", ".join(f"{name} {mb:.0f}" for name, mb in above.items()) + " MB"
    return Figure(format_.name, f"{n_nodes} nodes, beyond the chunk", here, "", max(above.values()), ABOVE_MB, True)


class Disk:
    """Reads and loads one chunk in a process of its own. A side for `benchmarks.sides`."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)

    def read(self) -> None:
        """All bytes, from the disk."""
        self._forget()
        piece = bytearray(PIECE_BYTES)
        with self._path.open("rb", buffering=0) as file:
            while file.readinto(piece):
                pass

    def load(self) -> None:
        """As a node does it."""
        self._forget()
        load_chunk(self._path)

    def _forget(self) -> None:
        """Removes the file from the page cache."""
        descriptor = os.open(self._path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


if __name__ == "__main__":
    serve(Disk)
