"""From a checkpoint to one chunk per node. Streams tensor by tensor; what is not finished never looks finished."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path

from mdi.checkpoint.manifest import ChunkEntry, Manifest, plan_hash
from mdi.checkpoint.plan import make_plan, role_names
from mdi.checkpoint.source import Source, parse_dtype
from mdi.checkpoint.writer import write_safetensors
from mdi.errors import CheckpointError
from mdi.model.weights import Shapes, stage_shapes

ByteProgress = Callable[[int, int], None]
"""Told (bytes done, bytes in all)."""

RESERVE_BYTES = 64 * 2**20


def chunk_folder(source: Path, n_nodes: int) -> Path:
    """Where a checkpoint's chunks for so many nodes lie."""
    return source / "chunks" / f"{n_nodes}nodes"


def prepare(
    source: Source,
    n_nodes: int,
    *,
    dtype: str | None = None,
    layers: Sequence[int] | None = None,
    progress: ByteProgress | None = None,
) -> Path:
    """Writes `chunks/{n}nodes/` in the checkpoint's folder, replacing what is there, and returns it.

    dtype: the checkpoint's own if None. layers: per node, overriding the plan. Raises CheckpointError for a checkpoint
    with missing or misshapen tensors or a full disk, ConfigError for an impossible split.
    """
    config = source.model_config
    dtype = dtype or config.dtype
    plan = make_plan(config, n_nodes, layers)
    shapes = [stage_shapes(config, spec) for spec in plan.stages]
    for stage in shapes:
        check_shapes(source, stage)
    total = sum(prod(shape) for stage in shapes for shape in stage.values()) * parse_dtype(dtype).itemsize
    folder = chunk_folder(source.path, n_nodes)
    with _new_folder(folder, total) as unfinished:
        done = 0

        def count(n_bytes: int) -> None:
            nonlocal done
            done += n_bytes
            if progress:
                progress(done, total)

        chunks = []
        for role, spec, stage in zip(role_names(n_nodes), plan.stages, shapes, strict=True):
            file = f"model_{role}.safetensors"
            sha256, size = write_safetensors(
                unfinished / file, stage, parse_dtype(dtype), source.tensor, {"format": "pt", "role": role}, count
            )
            chunks.append(ChunkEntry(role=role, file=file, size_bytes=size, sha256=sha256, **vars(spec)))
        Manifest(
            model=source.path.resolve().name,
            dtype=dtype,
            plan_hash=plan_hash(config, plan, dtype),
            config=source.config,
            chunks=tuple(chunks),
        ).write(unfinished)
    return folder


def check_shapes(source: Source, shapes: Shapes) -> None:
    """Raises CheckpointError, naming it, for a tensor that is missing or has another shape."""
    for name, shape in shapes.items():
        if (found := source.shape(name)) != shape:
            raise CheckpointError(f"the tensor {name} has shape {list(found)}, but config.json asks for {list(shape)}")


class _new_folder:  # noqa: N801 - a context manager, used like a function
    """A folder that takes its name only when everything in it is written."""

    def __init__(self, folder: Path, size_bytes: int) -> None:
        self.folder = folder
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(folder.parent).free
            if free < size_bytes + RESERVE_BYTES:
                raise CheckpointError(
                    f"the chunks take {size_bytes / 1e9:.1f} GB, but the disk has {free / 1e9:.1f} GB free"
                )
            self.unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        except OSError as error:
            raise CheckpointError(f"{str(folder.parent)!r} cannot be written ({error.strerror})") from None

    def __enter__(self) -> Path:
        return self.unfinished

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            if self.folder.exists():
                shutil.rmtree(self.folder)
            self.unfinished.chmod(0o755)
            self.unfinished.rename(self.folder)
        else:
            shutil.rmtree(self.unfinished, ignore_errors=True)
