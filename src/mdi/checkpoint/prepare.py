"""The chunks of a checkpoint: one file per node, written tensor by tensor, found again by what they were made of."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mdi.checkpoint.cache import Cache, default_cache_folder, mark_used
from mdi.checkpoint.fingerprint import Fingerprint
from mdi.checkpoint.locks import Hold, in_use
from mdi.checkpoint.manifest import ChunkEntry, Manifest, chunk_file, plan_hash
from mdi.checkpoint.new_folder import FolderInUseError, new_folder
from mdi.checkpoint.source import Source
from mdi.checkpoint.writer import write_safetensors
from mdi.core.errors import CheckpointError
from mdi.core.progress import Progress, counter
from mdi.core.tensors import ITEM_BYTES, Specs, total_bytes
from mdi.models.weights import stage_specs
from mdi.planning.plan import Plan, make_plan

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chunks:
    """Chunks that are used. They are not replaced or evicted until `close`, or until this process ends."""

    folder: Path
    manifest: Manifest
    hold: Hold

    def file(self, role: str) -> Path:
        """The chunk of a role."""
        return self.folder / chunk_file(role)

    def close(self) -> None:
        """Safe to call twice."""
        self.hold.close()


def chunk_folder(source: Path, n_nodes: int, *, vision_node: bool = False) -> Path:
    """The usual place of a checkpoint's chunks for so many nodes, and for a vision node beside them."""
    return source / "chunks" / _usual_name(n_nodes, vision_node)


def prepare(
    source: Source,
    n_nodes: int,
    *,
    dtype: str | None = None,
    layers: Sequence[int] | None = None,
    vision_node: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Writes the chunks to their usual place, replacing those that are there, and returns their folder.

    That is `chunks/{n}nodes` in the checkpoint's folder, or an entry of the cache where the folder cannot be written.
    dtype: the checkpoint's own if None. layers: per node, overriding the plan. vision_node: one chunk more has the
    vision tower, and the starter's has none. progress: called with bytes. Needs memory for one tensor.
    Raises CheckpointError for missing or misshapen tensors, for a full disk and for chunks in use, ConfigError for an
    impossible split.
    """
    plan = make_plan(source.model_config, n_nodes, layers, vision_node=vision_node)
    folder = _folders(source, _usual_name(n_nodes, vision_node))[-1]
    _write(folder, source, plan, dtype or source.model_config.dtype, Fingerprint(source, progress), progress)
    return folder


def prepared(
    source: Source,
    n_nodes: int,
    *,
    dtype: str | None = None,
    layers: Sequence[int] | None = None,
    vision_node: bool = False,
    measure: Callable[[], Sequence[int] | None] | None = None,
    progress: Progress | None = None,
) -> Chunks:
    """Finds the chunks of this checkpoint, or writes them: beside those of other layers or dtype, over outdated ones.

    dtype, layers: None takes what is in the usual place. measure: called for the layers when chunks are written and
    `layers` is None. See `prepare` for the rest.
    """
    config = source.model_config
    plan = make_plan(config, n_nodes, layers, vision_node=vision_node)
    search = _Search(Fingerprint(source, progress), n_nodes, vision_node, dtype, plan.layers if layers else None)
    details = "-".join([_usual_name(n_nodes, vision_node), dtype or config.dtype, *map(str, layers or ())])
    while True:
        for name in search.names(details):
            for folder in _folders(source, name):
                if chunks := search.open(folder):
                    return chunks
        if layers is None and measure:
            layers = measure()
            plan = make_plan(config, n_nodes, layers, vision_node=vision_node)
        folder = search.free([_folders(source, name)[-1] for name in search.names(details)])
        with suppress(FolderInUseError):  # another process was faster: perhaps its chunks will do
            _write(folder, source, plan, dtype or config.dtype, search.fingerprint, progress)


@dataclass(frozen=True)
class _Search:
    """The chunks that are wanted. dtype, layers: any if None."""

    fingerprint: Fingerprint
    n_nodes: int
    vision_node: bool
    dtype: str | None
    layers: tuple[int, ...] | None

    def names(self, details: str) -> Iterator[str]:
        """Names of folders that may have them, in order. The last one is only for this content of the checkpoint."""
        yield _usual_name(self.n_nodes, self.vision_node)
        yield details
        yield f"{details}-{_short(repr([file.sha256 for file in self.fingerprint.record()]))}"

    def open(self, folder: Path) -> Chunks | None:
        """The chunks in a folder if they are the ones. Notes new modification times of the same content."""
        try:
            hold = Hold(folder)
        except OSError:
            return None
        if (manifest := _manifest(folder)) is None or not self._fits(manifest):
            hold.close()
            return None
        if manifest.source != (files := self.fingerprint.record()):
            manifest = manifest.model_copy(update={"source": files})
            with suppress(OSError):  # the folder is read-only: the content is compared again next time
                manifest.write(folder)
        mark_used(folder)
        return Chunks(folder, manifest, hold)

    def free(self, folders: Sequence[Path]) -> Path:
        """The first folder that is not there, or is outdated and not in use; says so if it is the latter."""
        for folder in folders:
            if not folder.exists():
                return folder
            manifest = _manifest(folder)
            if (manifest is None or not self.fingerprint.matches(manifest.source)) and not in_use(folder):
                why = "made of other weights than are there now" if manifest else "damaged or of another version"
                log.warning("the chunks in %s are %s: preparing them again", folder, why)
                return folder
        raise FolderInUseError(f"{str(folders[-1])!r} is damaged and in use by a running server: stop it first")

    def _fits(self, manifest: Manifest) -> bool:
        plan = manifest.plan
        return (
            (plan.n_nodes, plan.vision is not None) == (self.n_nodes, self.vision_node)
            and self.dtype in (None, manifest.dtype)
            and self.layers in (None, plan.layers)
            and self.fingerprint.matches(manifest.source)
        )


def _manifest(folder: Path) -> Manifest | None:
    try:
        return Manifest.read(folder)
    except CheckpointError:
        return None


def _usual_name(n_nodes: int, vision_node: bool) -> str:
    return f"{n_nodes}nodes{'-vision' * vision_node}"


def _folders(source: Source, name: str) -> list[Path]:
    """Where chunks may be: beside the checkpoint, or in the cache if that is read-only. The last one can be written."""
    beside = source.path / "chunks" / name
    written = beside.parent if beside.parent.is_dir() else source.path
    if os.access(written, os.W_OK | os.X_OK):
        return [beside]
    return [beside, default_cache_folder() / f"{_short(str(source.path.resolve()))}-{name}"]


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _write(
    folder: Path, source: Source, plan: Plan, dtype: str, fingerprint: Fingerprint, progress: Progress | None
) -> None:
    config = source.model_config
    specs = [stage_specs(config, spec, dtype) for spec in plan.roles.values()]
    for stage in specs:
        check_tensors(source, stage)
    total = sum(total_bytes(stage.values()) for stage in specs)
    count = counter(progress, "preparing chunks", total)
    identity = plan_hash(config, plan, dtype)
    if folder.parent == default_cache_folder():
        cache = Cache.open()
        cache.check()
        cache.make_room(total)
    with new_folder(folder, total, "the chunks") as unfinished:
        chunks = []
        for (role, spec), stage in zip(plan.roles.items(), specs, strict=True):
            file = unfinished / chunk_file(role)
            metadata = chunk_metadata(role, identity)
            sha256, size = write_safetensors(file, stage, source.tensor, metadata, count)
            chunks.append(ChunkEntry(role=role, file=file.name, size_bytes=size, sha256=sha256, **vars(spec)))
        manifest = Manifest(
            model=source.path.resolve().name,
            dtype=dtype,
            plan_hash=identity,
            config=source.config,
            source=fingerprint.record(),
            chunks=tuple(chunks),
        )
        if fingerprint.changed():
            raise CheckpointError(f"{str(source.path)!r} was changed while its chunks were written: start again")
        manifest.write(unfinished)


def chunk_metadata(role: str, identity: str) -> dict[str, str]:
    """The metadata in the header of a chunk. They distinguish a chunk of another plan from a damaged one."""
    return {"format": "pt", "role": role, "plan_hash": identity}


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
