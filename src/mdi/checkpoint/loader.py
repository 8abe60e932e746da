"""Loads a stage's weights from a chunk or a checkpoint. Knows files and weights, nothing of requests.

A chunk must have exactly the tensors of its stage. Tensors come one at a time from short-lived mappings: what the model
copies is not resident twice. The embedding stays mapped, and only rows that were looked up are resident.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from mdi.checkpoint.fingerprint import hash_file
from mdi.checkpoint.manifest import ChunkEntry, Manifest
from mdi.checkpoint.prepare import check_tensors, chunk_metadata
from mdi.checkpoint.source import Source
from mdi.checkpoint.tensor_file import TensorFile
from mdi.checkpoint.weights import RankWeights, RoundedWeights, Weights
from mdi.core.dtypes import parse_dtype
from mdi.core.errors import CheckpointError, ConfigError
from mdi.core.progress import Progress, counter
from mdi.core.quantization import UNQUANTIZED, ModelQuantization, Quantization, QuantizedTensor
from mdi.core.tensors import Specs, minimum_name, order_name, scale_name, stored_specs, total_bytes, zero_name
from mdi.layers.linear import PackedLinear
from mdi.layers.quantize import dequantize
from mdi.models.config import ModelConfig, StageSpec
from mdi.models.decoder import EMBEDDING, Decoder
from mdi.models.parts import Parts
from mdi.models.registry import read_config
from mdi.models.weights import LoadedStage, load_stage, stage_specs
from mdi.planning.plan import make_plan


def load_chunk(
    path: Path,
    *,
    device: str = "cpu",
    dtype: str | None = None,
    progress: Progress | None = None,
    verified: Callable[[Manifest, ChunkEntry], None] | None = None,
) -> LoadedStage:
    """A stage from a chunk of `mdi prepare`, whose checksum is verified against the manifest beside it.

    dtype: of the stage; None takes the chunk's own. progress: called with bytes, where every byte counts twice:
    verified, loaded. verified: called between the two with what the chunk is.
    Raises CheckpointError for a damaged chunk, or one of another dtype or plan.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no chunk {str(path)!r}: run `mdi prepare`")
    manifest = Manifest.read(path.parent)
    entry = manifest.chunk(path.name)
    if dtype and parse_dtype(dtype) != parse_dtype(manifest.dtype):
        raise CheckpointError(
            f"{path.name} was prepared in {manifest.dtype}, not {dtype}: run `mdi prepare --dtype {dtype}`"
        )
    config = read_config(manifest.config)
    specs = stage_specs(config, entry.spec, manifest.dtype, manifest.quantization)
    count = counter(progress, "loading", entry.size_bytes + total_bytes(specs.values()))
    _check_chunk(path, entry, manifest, stored_specs(specs), count)
    if verified:
        verified(manifest, entry)
    get = _Load(_Chunk(TensorFile.open(path)), specs, parse_dtype(manifest.dtype), parse_device(device), count)
    return _loaded(config, entry.spec, get, manifest.quantization)


def load_source(
    source: Source,
    spec: StageSpec | None = None,
    *,
    dtype: str | None = None,
    quantization: ModelQuantization = UNQUANTIZED,
    device: str = "cpu",
    progress: Progress | None = None,
) -> LoadedStage:
    """A stage from a checkpoint without chunks, cast to `dtype`. spec: None is all; of a rank, its parts of it.

    quantization: that of the checkpoint, or none: then weights that are stored quantised are dequantised.
    Raises CheckpointError for a tensor that is missing or has another shape.
    """
    config = source.model_config
    dtype = dtype or config.dtype
    spec = spec or make_plan(config, 1).stages[0]
    specs = stage_specs(config, spec, dtype, quantization)
    check_tensors(source, stage_specs(config, replace(spec, rank=None), dtype, quantization))
    weights = RankWeights(RoundedWeights(source), Parts.of(config, spec, quantization))
    count = counter(progress, "loading", total_bytes(specs.values()))
    get = _Load(weights, specs, parse_dtype(dtype), parse_device(device), count)
    return _loaded(config, spec, get, quantization)


def chunk_weights(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and numbers of every weight in a chunk; float32 for those that are quantised, else as they are stored.

    In a rank's chunk they are its parts.
    """
    manifest, chunk = Manifest.read(path.parent), _Chunk(TensorFile.open(path))
    spec = manifest.chunk(path.name).spec
    specs = stage_specs(read_config(manifest.config), spec, manifest.dtype, manifest.quantization)
    for name, stored in specs.items():
        format_ = stored.quantization
        weight = dequantize(chunk.quantized(name, format_)) if format_ else chunk.tensor(name)
        yield name, weight.view(stored.shape)


def parse_device(name: str) -> torch.device:
    """A device by name. Raises ConfigError when this machine does not have it."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        raise ConfigError(f"this machine has no device {name!r}, or this PyTorch cannot use it") from None
    return device


@dataclass(frozen=True)
class _Load:
    """A `GetTensor` that reads a stage's weights. count: called with bytes."""

    weights: Weights
    specs: Specs
    dtype: torch.dtype
    device: torch.device
    count: Callable[[int], None]

    def __call__(self, name: str, _shape: tuple[int, ...], dtype: str | None = None, /) -> Tensor:
        tensor = self.weights.tensor(name).to(self.device, parse_dtype(dtype) if dtype else self.dtype)
        self.count(tensor.nbytes)
        return tensor

    def matrix(self, name: str, shape: tuple[int, ...], /) -> Tensor | QuantizedTensor:
        spec = self.specs[name]
        if spec.quantization is None:
            return self(name, shape)
        read = self.weights.quantized(name, spec.quantization)
        self.count(spec.size_bytes)
        return read.to(self.device)


@dataclass(frozen=True)
class _Chunk:
    """The weights of a chunk, mapped one by one."""

    file: TensorFile

    def tensor(self, name: str) -> Tensor:
        return self.file.tensor(name)

    def quantized(self, name: str, quantization: Quantization) -> QuantizedTensor:
        zeros = self.tensor(zero_name(name)) if quantization.zeros else None
        order = self.tensor(order_name(name)) if quantization.ordered else None
        minimums = self.tensor(minimum_name(name)) if quantization.minimums else None
        return QuantizedTensor(quantization, self.tensor(name), self.tensor(scale_name(name)), zeros, order, minimums)


def _loaded(config: ModelConfig, spec: StageSpec, get: _Load, quantization: ModelQuantization) -> LoadedStage:
    loaded = load_stage(config, spec, get.device, get, quantization)
    if get.device.type == "cpu":
        _release_rows(loaded.decoder, get.weights.tensor)
    return loaded


def _release_rows(decoder: Decoder, read: Callable[[str], Tensor]) -> None:
    """Maps the embedding anew where packing a tied head has read all its rows, so that none is resident."""
    if decoder.embedding is None or not isinstance(decoder.lm_head, PackedLinear):
        return
    mapped = read(EMBEDDING)
    if mapped.dtype == decoder.embedding.dtype:
        decoder.embedding = mapped


def _check_chunk(path: Path, entry: ChunkEntry, manifest: Manifest, specs: Specs, count: Callable[[int], None]) -> None:
    """Checks first which chunk it is, then that it is undamaged, then that it has exactly its stage's tensors."""
    metadata, found = _read_header(path)
    expected = chunk_metadata(entry.role, manifest.plan_hash)
    if metadata is not None and metadata != expected:
        raise CheckpointError(
            f"{path.name} was prepared for another plan, dtype, quantisation or node than the manifest beside it says: "
            "keep the files of one `mdi prepare` together, or run `mdi prepare` again"
        )
    whole = metadata is not None and path.stat().st_size == entry.size_bytes
    if not whole or hash_file(path, count) != entry.sha256:
        raise CheckpointError(
            f"{path.name} is damaged: its checksum is not the manifest's; copy it again, or run `mdi prepare` again"
        )
    if found != specs:
        raise CheckpointError(
            f"{path.name} does not hold the tensors of its layers: it was written by another version; "
            "run `mdi prepare` again"
        )


def _read_header(path: Path) -> tuple[dict[str, str] | None, Specs]:
    """A chunk's metadata and the specs of its tensors. None where the header cannot be read."""
    try:
        file = TensorFile.open(path)
    except (SafetensorError, OSError):
        return None, {}
    return file.metadata, file.specs
