"""Checkpoints in Hugging Face layout: config.json and one or several safetensors files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mdi.checkpoint.json_file import read_json
from mdi.core.errors import CheckpointError
from mdi.core.tensors import TensorSpec
from mdi.models.config import ModelConfig, StageSpec
from mdi.models.decoder import LM_HEAD
from mdi.models.registry import family_of, read_config
from mdi.models.weights import stage_specs

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class SafetensorsSource:
    """A `Source` in Hugging Face layout. Opening it reads config.json and the names of the tensors only."""

    path: Path
    config: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> SafetensorsSource:
        """Raises CheckpointError when the folder is no checkpoint of a supported architecture."""
        source = cls(path, read_json(path / "config.json"))
        source._check_files()
        source._check_names()
        return source

    @cached_property
    def model_config(self) -> ModelConfig:
        if self.config.get("quantization_config"):
            raise CheckpointError("quantised checkpoints are not supported: use the one they were made from")
        try:
            return read_config(self.config)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise CheckpointError(f"config.json lacks an entry or has one of the wrong kind ({error})") from None

    @property
    def files(self) -> tuple[Path, ...]:
        index = self.path / INDEX
        return (self.path / "config.json", *([index] if index.exists() else []), *self._weight_files)

    @property
    def _weight_files(self) -> list[Path]:
        return sorted({path for path, _ in self._places.values()})

    def names(self) -> frozenset[str]:
        return frozenset(self._places)

    def spec(self, name: str) -> TensorSpec:
        path, stored = self._place(name)
        with _opened(path) as file:
            entry = file.get_slice(stored)
            code = entry.get_dtype()
            return TensorSpec(tuple(entry.get_shape()), DTYPES.get(code, code))

    def tensor(self, name: str) -> Tensor:
        """One tensor, mapped from its file: its bytes are read when they are used."""
        path, stored = self._place(name)
        with _opened(path) as file:
            return file.get_tensor(stored)  # type: ignore[no-any-return]

    def _place(self, name: str) -> tuple[Path, str]:
        try:
            return self._places[name]
        except KeyError:
            raise CheckpointError(f"the checkpoint lacks the tensor {name}: download or convert it again") from None

    @cached_property
    def _places(self) -> dict[str, tuple[Path, str]]:
        """Name on the hub -> the tensor's file, and its name in that file."""
        if (self.path / INDEX).exists():
            stored = {name: self.path / file for name, file in _weight_map(self.path / INDEX).items()}
        else:
            stored = dict.fromkeys(_names_in(self.path / SINGLE), self.path / SINGLE)
        family = family_of(self.model_config.architecture)
        return {family.hub_name(name): (path, name) for name, path in stored.items()}

    def _check_files(self) -> None:
        for path in self._weight_files:
            if not path.is_file():
                raise CheckpointError(f"{self.path.name} lacks {path.name}: is the download complete?")

    def _check_names(self) -> None:
        """A tensor that the architecture does not have means that this code would compute another model."""
        config = self.model_config
        expected = stage_specs(config, StageSpec.everything(config), "float32")  # for the names alone
        left_over = sorted(self.names() - set(expected))
        for name in left_over:
            if not name.endswith("inv_freq") and not (name == LM_HEAD and config.tied_embeddings):
                raise CheckpointError(f"{config.architecture} has no tensor {name}: config.json and weights disagree")


def _names_in(path: Path) -> list[str]:
    if not path.exists():
        legacy = any(path.parent.glob("pytorch_model*.bin"))
        remedy = "convert its pytorch_model.bin to safetensors first" if legacy else "is the download complete?"
        raise CheckpointError(f"{path.parent.name} has no {SINGLE}: {remedy}")
    with _opened(path) as file:
        return list(file.keys())


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A short-lived mapping of a file. Tensors that were read keep their own mapping."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError):
        raise CheckpointError(f"{path.name} is damaged or missing: download or convert it again") from None


def _weight_map(path: Path) -> dict[str, str]:
    files = read_json(path).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise CheckpointError(f"{path.name} is damaged: download it again")
    return files
