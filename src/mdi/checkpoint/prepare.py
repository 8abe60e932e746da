"""The chunks of a checkpoint: one file per node, written tensor by tensor, found again by what they were made of."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, groupby
from pathlib import Path

from mdi.checkpoint.cache import Cache, default_cache_folder, mark_used
from mdi.checkpoint.calibration import CalibratedWeights, CalibrationText
from mdi.checkpoint.chunk_writer import ChunkWriter, write_together
from mdi.checkpoint.fingerprint import Fingerprint
from mdi.checkpoint.gguf import GgufSource
from mdi.checkpoint.locks import Hold, in_use
from mdi.checkpoint.manifest import CalibrationEntry, ChunkEntry, Manifest, chunk_file, plan_hash
from mdi.checkpoint.new_folder import FolderInUseError, new_folder
from mdi.checkpoint.quantized import QuantizedSource
from mdi.checkpoint.random_weights import is_random
from mdi.checkpoint.source import Source
from mdi.checkpoint.tensor_file import DTYPES
from mdi.checkpoint.weights import RoundedWeights, UnfitError, Weights, source_name
from mdi.core.errors import CheckpointError
from mdi.core.progress import Progress, counter
from mdi.core.quantization import UNQUANTIZED, ModelQuantization
from mdi.core.tensors import Specs, total_bytes
from mdi.models.config import StageSpec
from mdi.models.parts import Parts
from mdi.models.weights import log_unquantized, stage_specs
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


def chunk_folder(source: Path, n_nodes: int, *, groups: Sequence[int] | None = None, vision_node: bool = False) -> Path:
    """The usual place of a checkpoint's chunks for so many nodes, and for a vision node beside them."""
    return source / "chunks" / _usual_name(n_nodes, groups, vision_node)


def prepare(
    source: Source,
    n_nodes: int,
    *,
    dtype: str | None = None,
    quantization: ModelQuantization = UNQUANTIZED,
    calibration: CalibrationText | None = None,
    layers: Sequence[int] | None = None,
    groups: Sequence[int] | None = None,
    shards: int = 1,
    vision_node: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Writes the chunks to their usual place, replacing those that are there, and returns their folder.

    That is `chunks/{n}nodes` in the folder of the checkpoint, or of its adapter, or an entry of the cache where this
    folder cannot be written. dtype: the checkpoint's own if None. calibration: the text that decides how the decoder's
    int4 weights are rounded; None rounds all to the nearest; what is quantised already is never calibrated. layers: per
    stage, overriding the plan. groups: ranks of each stage; None is one node a stage. shards: see `make_plan`.
    vision_node: one chunk more has the vision tower, and the starter's has none. progress: called with bytes. Needs
    memory for one tensor, or for calibration.
    Raises CheckpointError for missing or misshapen tensors, for a full disk and for chunks in use, ConfigError for an
    impossible split.
    """
    plan = make_plan(
        source.model_config,
        n_nodes,
        layers,
        groups=groups,
        shards=shards,
        quantization=quantization,
        vision_node=vision_node,
    )
    folder = _folders(source, _usual_name(n_nodes, groups, vision_node))[-1]
    dtype = dtype or source.model_config.dtype
    if _is_rounded(source) and calibration:
        if calibration != CalibrationText.default():
            log.warning("the calibration text %r is not used: the checkpoint is quantised already", calibration.name)
        calibration = None
    contents = _Contents(source, plan, dtype, quantization, calibration)
    _write(folder, contents, Fingerprint(source, progress), progress)
    return folder


def prepared(
    source: Source,
    n_nodes: int,
    *,
    dtype: str | None = None,
    quantization: ModelQuantization | None = None,
    layers: Sequence[int] | None = None,
    groups: Sequence[int] | None = None,
    shards: int = 1,
    vision_node: bool = False,
    measure: Callable[[], Plan] | None = None,
    progress: Progress | None = None,
) -> Chunks:
    """Finds the chunks of this checkpoint, or writes them: beside those of another kind, over outdated ones.

    dtype, quantization, layers: None takes what is in the usual place, or is stored. groups: None is one node a stage,
    or, with `measure` and without layers, any. shards: of a plan with groups; 1 is any number.
    measure: called for the plan when chunks are written, unless layers are given, and no groups.
    See `prepare` for the rest.
    """
    config, formats = source.model_config, quantization or source.quantization
    plan = make_plan(
        config, n_nodes, layers, groups=groups, shards=shards, quantization=formats, vision_node=vision_node
    )
    kind = _Kind(
        n_nodes,
        vision_node,
        dtype,
        quantization,
        layers=plan.layers if layers else None,
        groups=None if measure and not layers and not groups else plan.groups,
        shards=shards,
    )
    search = _Search(Fingerprint(source, progress), kind)
    details = kind.details(config.dtype)
    while True:
        for name in search.names(details):
            for folder in _folders(source, name):
                if chunks := search.open(folder):
                    return chunks
        if measure and (layers is None or groups):
            plan, measure = measure(), None
        usual, *others = search.names(details)  # who asks for nothing later is not to get quantised chunks
        names = [usual, *others] if quantization in (None, source.quantization) else others
        folder = search.free([_folders(source, name)[-1] for name in names])
        with suppress(FolderInUseError):  # another process was faster: perhaps its chunks will do
            text = None if is_random(source.path) or _is_rounded(source) else CalibrationText.default()
            contents = _Contents(source, plan, dtype or config.dtype, formats, text)
            _write(folder, contents, search.fingerprint, progress)


def _is_rounded(source: Source) -> bool:
    """Whether its weights are quantised already, at least in part: calibration would round them once more."""
    return isinstance(source, QuantizedSource) or (isinstance(source, GgufSource) and source.has_int4)


@dataclass(frozen=True)
class _Kind:
    """The kind of chunks that is wanted. n_nodes: with machines that a plan leaves out.

    dtype, quantization, layers, groups: any if None. shards: any if 1.
    """

    n_nodes: int
    vision_node: bool
    dtype: str | None
    quantization: ModelQuantization | None
    layers: tuple[int, ...] | None
    groups: tuple[int, ...] | None
    shards: int

    def fits(self, manifest: Manifest) -> bool:
        plan = manifest.plan
        return (
            (plan.n_machines, plan.vision is not None) == (self.n_nodes, self.vision_node)
            and self.dtype in (None, manifest.dtype)
            and (self.quantization is None or self.quantization.parts == manifest.quantization.parts)
            and self.layers in (None, plan.layers)
            and self.groups in (None, plan.groups)
            and (self.shards in (1, plan.n_shards) or max(plan.groups) == 1)
        )

    @property
    def usual_name(self) -> str:
        """The name of the folder for most kinds with these groups."""
        return _usual_name(self.n_nodes, self.groups, self.vision_node)

    def details(self, dtype: str) -> str:
        """The name of a folder for this kind alone. dtype: where none is wanted."""
        formats = re.findall(r"\w+", str(self.quantization)) if self.quantization else []
        shards = [f"shards{self.shards}"] * (self.shards > 1 and max(self.groups or (1,)) > 1)
        return "-".join([self.usual_name, self.dtype or dtype, *formats, *shards, *map(str, self.layers or ())])


@dataclass(frozen=True)
class _Search:
    """Chunks of a kind, made of a checkpoint's weights as they are now."""

    fingerprint: Fingerprint
    kind: _Kind

    def names(self, details: str) -> Iterator[str]:
        """Names of folders that may have them, in order. The last one is only for this content of the checkpoint."""
        yield self.kind.usual_name
        yield details
        yield f"{details}-{_short(repr([file.sha256 for file in self.fingerprint.record()]))}"

    def open(self, folder: Path) -> Chunks | None:
        """The chunks in a folder if they are the ones. Notes new modification times of the same content."""
        try:
            hold = Hold(folder)
        except OSError:
            return None
        manifest = _manifest(folder)
        if not (manifest and self.kind.fits(manifest) and self.fingerprint.matches(manifest.source)):
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


def _manifest(folder: Path) -> Manifest | None:
    try:
        return Manifest.read(folder)
    except CheckpointError:
        return None


def _usual_name(n_nodes: int, groups: Sequence[int] | None, vision_node: bool) -> str:
    grouped = "-groups-" + "-".join(map(str, groups)) if groups and max(groups) > 1 else ""
    return f"{n_nodes}nodes{grouped}{'-vision' * vision_node}"


def _folders(source: Source, name: str) -> list[Path]:
    """Where chunks may be: beside the checkpoint, or in the cache if that is read-only. The last one can be written."""
    beside = source.home / "chunks" / name
    written = beside.parent if beside.parent.is_dir() else source.home
    if os.access(written, os.W_OK | os.X_OK):
        return [beside]
    return [beside, default_cache_folder() / f"{_short(str(source.home.resolve()))}-{name}"]


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class _Contents:
    """What chunks are to hold."""

    source: Source
    plan: Plan
    dtype: str
    quantization: ModelQuantization
    calibration: CalibrationText | None

    def weights(self) -> RoundedWeights | CalibratedWeights:
        """What the chunks are made of, from the first layer on."""
        if self.calibration and self.quantization.calibrated:
            log.info(
                "calibrating int4 weights with the text %r: minutes for some billion weights", self.calibration.name
            )
            return CalibratedWeights(self.source, self.calibration, self.quantization)
        return RoundedWeights(self.source)

    @property
    def recorded(self) -> CalibrationEntry | None:
        """What the manifest says of the calibration."""
        if self.calibration is None or not self.quantization.calibrated:
            return None
        return CalibrationEntry(name=self.calibration.name, sha256=self.calibration.sha256)

    def specs(self, spec: StageSpec) -> Specs:
        """The tensors of a stage's chunk."""
        return stage_specs(self.source.model_config, spec, self.dtype, self.quantization)

    @property
    def size_bytes(self) -> int:
        """Of all chunks' tensors."""
        return sum(total_bytes(self.specs(spec).values()) for spec in self.plan.roles.values())

    @cached_property
    def identity(self) -> str:
        """What all its chunks have in common."""
        return plan_hash(self.source.model_config, self.plan, self.dtype, self.quantization)

    @property
    def groups(self) -> list[dict[str, StageSpec]]:
        """The stages of the plan's roles, those of a group's ranks together."""
        by_layers = groupby(self.plan.roles.items(), key=lambda item: item[1].layers)
        return [dict(group) for _, group in by_layers]

    def chunk(self, folder: Path, role: str, spec: StageSpec, count: Callable[[int], None]) -> closing[ChunkWriter]:
        """A role's chunk, to be written."""
        parts = Parts.of(self.source.model_config, spec, self.quantization)
        metadata = chunk_metadata(role, self.identity)
        return closing(ChunkWriter(folder / chunk_file(role), self.specs(spec), parts, metadata, count))

    def keeping(self, name: str) -> _Contents:
        """The same with one matrix more that is not quantised."""
        kept = (*self.quantization.kept, name)
        return replace(self, quantization=replace(self.quantization, kept=kept))


def _write(folder: Path, contents: _Contents, fingerprint: Fingerprint, progress: Progress | None) -> None:
    """Begins again, which is rare, without the quantisation of a matrix that turns out not to have one."""
    for spec in contents.plan.roles.values():
        check_tensors(contents.source, contents.specs(replace(spec, rank=None)))
    log_unquantized(contents.source.model_config, contents.quantization)
    while True:
        try:
            return _write_all(folder, contents, fingerprint, progress)
        except UnfitError as error:
            log.warning("%s; it stays in %s", error, contents.dtype)
            contents = contents.keeping(error.name)


def _write_all(folder: Path, contents: _Contents, fingerprint: Fingerprint, progress: Progress | None) -> None:
    source, total = contents.source, contents.size_bytes
    count = counter(progress, "preparing chunks", total)
    if folder.parent == default_cache_folder():
        cache = Cache.open()
        cache.check()
        cache.make_room(total)
    with new_folder(folder, total, "the chunks") as unfinished:
        weights = contents.weights()
        written = [_write_group(unfinished, contents, stages, weights, count) for stages in contents.groups]
        manifest = Manifest(
            model=source.path.resolve().name,
            dtype=contents.dtype,
            quantization=contents.quantization,
            calibration=contents.recorded,
            plan_hash=contents.identity,
            config=source.config,
            source=fingerprint.record(),
            chunks=tuple(chain.from_iterable(written)),
            left_out=contents.plan.left_out,
        )
        if fingerprint.changed():
            raise CheckpointError(f"{str(source.path)!r} was changed while its chunks were written: start again")
        manifest.write(unfinished)
    if error := weights.rounding.relative_error:
        log.info(
            "weights of %s that were quantised are now %s: a relative error of %.2f %%",
            source.path.name,
            contents.quantization,
            100 * error,
        )


def _write_group(
    folder: Path, contents: _Contents, stages: dict[str, StageSpec], weights: Weights, count: Callable[[int], None]
) -> list[ChunkEntry]:
    """The chunks of one stage: of a group's ranks, or of one node."""
    with ExitStack() as files:
        chunks = {role: files.enter_context(contents.chunk(folder, role, spec, count)) for role, spec in stages.items()}
        write_together(list(chunks.values()), weights)
        return [
            ChunkEntry(
                role=role,
                file=chunk_file(role),
                size_bytes=chunk.size_bytes,
                sha256=chunk.sha256,
                **vars(stages[role]),
            )
            for role, chunk in chunks.items()
        ]


def chunk_metadata(role: str, identity: str) -> dict[str, str]:
    """The metadata in the header of a chunk. They distinguish a chunk of another plan from a damaged one."""
    return {"format": "pt", "role": role, "plan_hash": identity}


def check_tensors(source: Source, specs: Specs) -> None:
    """Raises CheckpointError, naming it, for a tensor that is missing, misshapen or quantised."""
    for name, spec in specs.items():
        if (found := source.spec(source_name(source, name))).shape != spec.shape:
            sizes = f"shape {list(found.shape)}, but config.json asks for {list(spec.shape)}"
            raise CheckpointError(f"the tensor {name} has {sizes}: config.json and weights disagree")
        if found.dtype not in DTYPES.values():
            raise CheckpointError(
                f"the tensor {name} is stored as {found.dtype}, which is not supported: use what it was made from"
            )
