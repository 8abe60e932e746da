"""The encoding of images and videos on a vision node: from patch rows to embeddings."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import AsyncIterator, Generator

import torch
from torch import Tensor

from mdi.core.errors import LinkError
from mdi.core.tracing import BusyMeter, Recorder
from mdi.layers.rope import Grid
from mdi.models.weights import LoadedStage
from mdi.rpc import codec, node_pb2


class Encoder:
    """Encodes one image or video after the other, in a thread. busy: the time it spends at work."""

    def __init__(self, recorder: Recorder) -> None:
        self.busy = BusyMeter()
        self._recorder = recorder
        self._one_by_one = asyncio.Lock()

    async def encode(self, loaded: LoadedStage, grid: Grid, data: bytearray) -> Tensor:
        """Embeddings, [tokens, embedding_width]. Cancelled, it ends after a part of the work.

        Raises LinkError for bytes that do not fit the grid.
        """
        rows = rows_of(loaded, grid, data)
        async with self._one_by_one:
            abandoned = threading.Event()
            work = asyncio.ensure_future(asyncio.to_thread(self._encode, loaded, rows, grid, abandoned))
            try:
                return await asyncio.shield(work)
            except asyncio.CancelledError:
                abandoned.set()
                await asyncio.wait([work])
                raise

    def _encode(self, loaded: LoadedStage, rows: Tensor, grid: Grid, abandoned: threading.Event) -> Tensor:
        assert loaded.vision is not None
        with self.busy, self._recorder.span("encode"), torch.inference_mode():
            return _result(loaded.vision.encode_steps(rows, grid), abandoned)


async def collect_rows(pieces: AsyncIterator[node_pb2.EncodePiece]) -> tuple[str, Grid, bytearray]:
    """Manifest digest, grid and bytes of all pieces. Raises LinkError for more bytes than a batch may have."""
    digest, grid, data = "", (0, 0, 0), bytearray()
    async for piece in pieces:
        if piece.grid:
            digest, grid = piece.manifest_digest, _grid(piece)
        data += piece.data
        if len(data) > codec.MAX_BATCH_BYTES:
            raise LinkError(f"an image is larger than {codec.MAX_BATCH_BYTES} bytes")
    return digest, grid, data


def rows_of(loaded: LoadedStage, grid: Grid, data: bytearray) -> Tensor:
    """Patch rows, [patches, patch_elements]. Raises LinkError for bytes that do not fit the grid."""
    vision = loaded.config.vision
    assert vision is not None
    expected = math.prod(grid) * vision.patch_elements * loaded.dtype.itemsize
    if not data or len(data) != expected or grid[1] % vision.merge_size or grid[2] % vision.merge_size:
        raise LinkError(f"{len(data)} bytes of patch rows arrived for a grid of {grid}")
    return torch.frombuffer(data, dtype=loaded.dtype).view(-1, vision.patch_elements)


def _grid(piece: node_pb2.EncodePiece) -> Grid:
    if len(piece.grid) != 3:
        raise LinkError("a grid has three sides")
    t, h, w = piece.grid
    return t, h, w


def _result(steps: Generator[None, None, Tensor], abandoned: threading.Event) -> Tensor:
    """What a generator returns at its end. Raises LinkError when it is abandoned before."""
    while not abandoned.is_set():
        try:
            next(steps)
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]
    raise LinkError("the image is not wanted any more")
