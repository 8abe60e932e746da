"""From a checkpoint to one chunk per node, tensor by tensor. Knows files and plans, nothing of running nodes.

What is not finished never looks finished.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from mdi.checkpoint.manifest import ChunkEntry, Manifest, chunk_file, plan_hash
from mdi.checkpoint.source import Source
from mdi.checkpoint.writer import write_safetensors
from mdi.core.errors import CheckpointError
from mdi.core.progress import Progress
from mdi.core.tensors import ITEM_BYTES, Specs, total_bytes
from mdi.models.weights import stage_specs
from mdi.planning.plan import make_plan

RESERVE_BYTES = 64 * 2**20


def chunk_folder(source: Path, n_nodes: int, *, vision_node: bool = False) -> Path:
    """Where a checkpoint's chunks for so many nodes lie, and for one with the vision tower beside them."""
    return source / "chunks" / f"{n_nodes}nodes{'-vision' * vision_node}"


def prepare(
    source: Source,
    n_nodes: int,
    *,
    dtype: str | None = None,
    layers: Sequence[int] | None = None,
    vision_node: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Writes `chunks/{n}nodes/` in the checkpoint's folder, replacing what is there, and returns it.

    dtype: the checkpoint's own if None. layers: per node, overriding the plan. vision_node: one chunk more has the
    vision tower, and the starter's has none. progress: called with bytes. Needs memory for one tensor.
    Raises CheckpointError for missing or misshapen tensors and for a full disk, ConfigError for an impossible split.
    """
    config = source.model_config
    dtype = dtype or config.dtype
    plan = make_plan(config, n_nodes, layers, vision_node=vision_node)
    specs = [stage_specs(config, spec, dtype) for spec in plan.roles.values()]
    for stage in specs:
        check_tensors(source, stage)
    total = sum(total_bytes(stage.values()) for stage in specs)
    count = counter(progress, "preparing chunks", total)
    identity = plan_hash(config, plan, dtype)
    folder = chunk_folder(source.path, n_nodes, vision_node=vision_node)
    with _new_folder(folder, total) as unfinished:
        chunks = []
        for (role, spec), stage in zip(plan.roles.items(), specs, strict=True):
            file = unfinished / chunk_file(role)
            metadata = chunk_metadata(role, identity)
            sha256, size = write_safetensors(file, stage, source.tensor, metadata, count)
            chunks.append(ChunkEntry(role=role, file=file.name, size_bytes=size, sha256=sha256, **vars(spec)))
        name = source.path.resolve().name
        manifest = Manifest(model=name, dtype=dtype, plan_hash=identity, config=source.config, chunks=tuple(chunks))
        manifest.write(unfinished)
    return folder


def chunk_metadata(role: str, identity: str) -> dict[str, str]:
    """What a chunk's own header says it is, so that one of another plan is told from a damaged one."""
    return {"format": "pt", "role": role, "plan_hash": identity}


def counter(progress: Progress | None, what: str, total: int) -> Callable[[int], None]:
    """A function that adds up the bytes it is called with, and passes the sum to `progress`."""
    done = 0

    def count(n_bytes: int) -> None:
        nonlocal done
        done += n_bytes
        if progress:
            progress(what, done, total)

    return count


def check_tensors(source: Source, specs: Specs) -> None:
    """Raises CheckpointError, naming it, for a tensor that is missing, misshapen or quantised."""
    for name, spec in specs.items():
        if (found := source.spec(name)).shape != spec.shape:
            sizes = f"shape {list(found.shape)}, but config.json asks for {list(spec.shape)}"
            raise CheckpointError(f"the tensor {name} has {sizes}: config.json and weights disagree")
        if found.dtype not in ITEM_BYTES:
            raise CheckpointError(
                f"the tensor {name} is stored as {found.dtype}: quantised checkpoints are not supported"
            )


@contextmanager
def _new_folder(folder: Path, size_bytes: int) -> Iterator[Path]:
    """Gives an unfinished folder that takes its name when all is written, and goes when something fails."""
    unfinished = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _clear_remains(folder)
        _check_space(folder.parent, size_bytes)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        with _lock(unfinished):
            yield unfinished
            _put_in_place(unfinished, folder)
    except OSError as error:
        raise CheckpointError(f"{str(folder.parent)!r} cannot be written ({error.strerror})") from None
    finally:
        if unfinished:
            shutil.rmtree(unfinished, ignore_errors=True)


def _clear_remains(folder: Path) -> None:
    """Removes what killed writers left; a living one holds its lock."""
    for remains in folder.parent.glob(f".{folder.name}-*"):
        with suppress(OSError), _lock(remains):
            shutil.rmtree(remains)


def _check_space(folder: Path, size_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size_bytes + RESERVE_BYTES:
        sizes = f"{size_bytes / 1e9:.1f} GB, but the disk has {free / 1e9:.1f} GB free"
        raise CheckpointError(f"the chunks take {sizes}: make room, or use a smaller dtype")


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Raises BlockingIOError where another process holds it. The system lets go when a process dies."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _put_in_place(unfinished: Path, folder: Path) -> None:
    unfinished.chmod(0o755)
    if not folder.exists():
        unfinished.rename(folder)
        return
    replaced = unfinished.with_name(unfinished.name + "-replaced")
    folder.rename(replaced)
    unfinished.rename(folder)
    shutil.rmtree(replaced, ignore_errors=True)
