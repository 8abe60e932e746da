"""From a chunk, or straight from a checkpoint, to a stage's weights in memory. Strict: nothing missing, nothing left over.

Tensors are handed out one at a time from short-lived mappings, so what the model copies does not stay resident twice;
the embedding stays mapped, and only the rows that are looked up become resident.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mdi.checkpoint.manifest import Manifest
from mdi.checkpoint.plan import make_plan
from mdi.checkpoint.prepare import ByteProgress, check_shapes
from mdi.checkpoint.source import Source, parse_dtype
from mdi.errors import CheckpointError, ConfigError
from mdi.model.config import ModelConfig
from mdi.model.decoder import Decoder, Get
from mdi.model.vision import VisionTower
from mdi.model.weights import Shapes, StageSpec, stage_shapes

HASH_BLOCK = 16 * 2**20


@dataclass(frozen=True)
class LoadedStage:
    """A stage's weights, ready to compute. vision: None where the stage has no vision tower."""

    config: ModelConfig
    spec: StageSpec
    dtype: torch.dtype
    device: torch.device
    decoder: Decoder
    vision: VisionTower | None


def load_chunk(
    path: Path, *, device: str = "cpu", dtype: str | None = None, progress: ByteProgress | None = None
) -> LoadedStage:
    """A stage from the chunk that `mdi prepare` wrote, its checksum verified against the manifest beside it.

    dtype: what the caller expects it in; None takes it as it is. progress counts every byte twice: verified, loaded.
    Raises CheckpointError for a damaged chunk, or one of another dtype or plan.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no chunk {str(path)!r}: run `mdi prepare`")
    manifest = Manifest.read(path.parent)
    entry = manifest.chunk(path.name)
    if dtype and dtype != manifest.dtype:
        raise CheckpointError(f"{path.name} was prepared in {manifest.dtype}, not {dtype}: run `mdi prepare --dtype {dtype}`")
    total = 2 * entry.size_bytes
    count = _counter(progress, total)
    if path.stat().st_size != entry.size_bytes or _sha256(path, count) != entry.sha256:
        raise CheckpointError(f"{path.name} is damaged: its checksum is not the manifest's; run `mdi prepare` again")
    config = ModelConfig.from_hf(manifest.config)
    shapes = stage_shapes(config, entry.spec)
    _check_chunk(path, shapes, parse_dtype(manifest.dtype))
    return _load(config, entry.spec, shapes, manifest.dtype, device, lambda name: _mapped(path, name), count)


def load_source(
    source: Source,
    spec: StageSpec | None = None,
    *,
    dtype: str | None = None,
    device: str = "cpu",
    progress: ByteProgress | None = None,
) -> LoadedStage:
    """A stage (the whole model if no spec is given) straight from a checkpoint, cast to `dtype`; no chunk needed."""
    config = source.model_config
    dtype = dtype or config.dtype
    spec = spec or make_plan(config, 1).stages[0]
    shapes = stage_shapes(config, spec)
    check_shapes(source, shapes)
    total = sum(map(prod, shapes.values())) * parse_dtype(dtype).itemsize
    return _load(config, spec, shapes, dtype, device, source.tensor, _counter(progress, total))


def parse_device(name: str) -> torch.device:
    """A device by name. Raises ConfigError when this machine does not have it."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        raise ConfigError(f"this machine has no device {name!r}, or this PyTorch cannot use it") from None
    return device


def _load(
    config: ModelConfig,
    spec: StageSpec,
    shapes: Shapes,
    dtype_name: str,
    device_name: str,
    read: Get,
    count: Callable[[int], None],
) -> LoadedStage:
    dtype, device = parse_dtype(dtype_name), parse_device(device_name)
    remaining = set(shapes)

    def get(name: str) -> Tensor:
        remaining.remove(name)
        tensor = read(name).to(device, dtype)
        count(tensor.nbytes)
        return tensor

    vision = VisionTower(config.vision, get) if spec.vision and config.vision else None
    decoder = Decoder(config, spec, get)
    assert not remaining, f"tensors nobody asked for: {remaining}"
    return LoadedStage(config, spec, dtype, device, decoder, vision)


def _check_chunk(path: Path, shapes: Shapes, dtype: torch.dtype) -> None:
    try:
        with safe_open(path, "pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{path.name} is no safetensors file ({error}): run `mdi prepare` again") from None
    if found != shapes:
        name = min(found.items() ^ shapes.items())[0]
        raise CheckpointError(f"{path.name} does not hold what its manifest says (see {name}): run `mdi prepare` again")


def _mapped(path: Path, name: str) -> Tensor:
    with safe_open(path, "pt") as file:
        return file.get_tensor(name)  # type: ignore[no-any-return]


def _sha256(path: Path, count: Callable[[int], None]) -> str:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(HASH_BLOCK))
    with path.open("rb", buffering=0) as file:
        while n_bytes := file.readinto(buffer):
            digest.update(buffer[:n_bytes])
            count(n_bytes)
    return digest.hexdigest()


def _counter(progress: ByteProgress | None, total: int) -> Callable[[int], None]:
    done = 0

    def count(n_bytes: int) -> None:
        nonlocal done
        done = min(done + n_bytes, total)
        if progress:
            progress(done, total)

    return count
