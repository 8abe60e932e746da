"""An image's way to a vision node and back: patch rows out, embeddings in. Both ends; knows no waiting, no retries."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Generator, Iterator

import torch
from torch import Tensor

from mdi.core.errors import LinkError
from mdi.layers.rope import Grid
from mdi.models.stage import LoadedStage
from mdi.rpc import codec, node_pb2


async def collect_rows(pieces: AsyncIterator[node_pb2.EncodePiece]) -> tuple[str, Grid, bytearray]:
    """Manifest digest, grid and bytes, all of them. Raises LinkError for more than a batch may have."""
    digest, grid, data = "", (0, 0, 0), bytearray()
    async for piece in pieces:
        if piece.grid:
            digest, grid = piece.manifest_digest, _grid(piece)
        data += piece.data
        if len(data) > codec.MAX_BATCH_BYTES:
            raise LinkError(f"an image is larger than {codec.MAX_BATCH_BYTES} bytes")
    return digest, grid, data


def rows_of(loaded: LoadedStage, grid: Grid, data: bytearray) -> tuple[Tensor, Grid]:
    """What `VisionTower.encode_steps` takes. Raises LinkError for bytes that are not what the grid says."""
    vision = loaded.config.vision
    assert vision is not None
    expected = math.prod(grid) * vision.patch_elements * loaded.dtype.itemsize
    if not data or len(data) != expected or grid[1] % vision.merge_size or grid[2] % vision.merge_size:
        raise LinkError(f"{len(data)} bytes of patch rows arrived for a grid of {grid}")
    return torch.frombuffer(data, dtype=loaded.dtype).view(-1, vision.patch_elements), grid


def embedding_pieces(embeddings: Tensor) -> Iterator[node_pb2.EmbeddingsPiece]:
    """[tokens, width] as messages."""
    return (node_pb2.EmbeddingsPiece(data=data) for data in codec.pieces(embeddings))


def run_to_end(steps: Generator[None, None, Tensor]) -> Tensor:
    """A generator's result."""
    while True:
        try:
            next(steps)
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]


def _grid(piece: node_pb2.EncodePiece) -> Grid:
    if len(piece.grid) != 3:
        raise LinkError("a grid has three sides")
    t, h, w = piece.grid
    return t, h, w
