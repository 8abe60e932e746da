"""What a checkpoint is to the rest of the project, whatever its file format: `Source`, and `open_source`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from mdi.checkpoint.adapter import AdaptedSource, Adapter
from mdi.checkpoint.gguf import LINK, GgufSource
from mdi.checkpoint.json_file import read_json
from mdi.checkpoint.quantized import ENTRY, QuantizedSource
from mdi.checkpoint.safetensors import SafetensorsSource
from mdi.core.errors import CheckpointError
from mdi.core.quantization import ModelQuantization, Quantization, QuantizedTensor
from mdi.core.tensors import TensorSpec
from mdi.models.config import ModelConfig
from mdi.models.entries import CONFIG


class Source(Protocol):
    """An opened checkpoint. Tensors are read one at a time, under the names that they have on the hub."""

    @property
    def path(self) -> Path:
        """Its folder."""

    @property
    def home(self) -> Path:
        """The folder that its chunks are kept in."""

    @property
    def config(self) -> dict[str, Any]:
        """The contents of config.json."""

    @property
    def model_config(self) -> ModelConfig:
        """The same, parsed. Raises CheckpointError for a model that is not supported."""

    @property
    def quantization(self) -> ModelQuantization:
        """The formats that its parts get where nothing is asked for: those that are nearest to how they are stored."""

    @property
    def is_exact(self) -> bool:
        """Whether all its matrices are stored in these formats, and none is rounded to them."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that decide what the model computes: weights, their index, config.json."""

    def names(self) -> frozenset[str]:
        """Names of all tensors."""

    def spec(self, name: str) -> TensorSpec:
        """Shape and stored type of a tensor. Raises CheckpointError for one that is not there."""

    def tensor(self, name: str) -> Tensor:
        """One tensor. Raises CheckpointError for one that is not there."""

    def quantized(self, name: str, quantization: Quantization) -> QuantizedTensor | None:
        """A matrix with the integers and scales that it is stored with, where they are of this format."""


def open_source(path: Path, adapter: Path | None = None) -> Source:
    """Opens a checkpoint's folder. adapter: folder of a LoRA adapter that is merged into it.

    Raises CheckpointError when it is no checkpoint of a supported architecture, or the adapter is not one of it.
    """
    source = _opened(path)
    return AdaptedSource.of(source, Adapter.open(adapter)) if adapter else source


def _opened(path: Path) -> Source:
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint folder {str(path)!r}")
    if (path / LINK).exists():
        return GgufSource.open(path)
    return QuantizedSource.open(path) if read_json(path / CONFIG).get(ENTRY) else SafetensorsSource.open(path)
