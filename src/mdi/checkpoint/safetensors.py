"""Checkpoints in Hugging Face layout: config.json and one or several safetensors files."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mdi.checkpoint.json_file import read_json, refuse_damaged
from mdi.core.errors import CheckpointError
from mdi.core.quantization import UNQUANTIZED, ModelQuantization, Quantization, QuantizedTensor
from mdi.core.tensors import TensorSpec
from mdi.models.config import ModelConfig, StageSpec, unusable
from mdi.models.decoder import EMBEDDING, LM_HEAD
from mdi.models.entries import CONFIG
from mdi.models.registry import family_of, read_config
from mdi.models.weights import stage_specs

log = logging.getLogger(__name__)

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
        source = cls(path, read_json(path / CONFIG))
        source._check_names()
        if source._single and (path / INDEX).exists():
            log.warning("%s has %s and %s: the first is used, as in transformers", path.name, SINGLE, INDEX)
        return replace(source, config=source._settled())

    @cached_property
    def model_config(self) -> ModelConfig:
        if self.config.get("quantization_config"):
            raise unusable("quantised checkpoints are not supported: use the one it was made from")
        return read_config(self.config)

    @property
    def files(self) -> tuple[Path, ...]:
        index = [] if self._single else [self.path / INDEX]
        return (self.path / CONFIG, *index, *self._stored)

    @property
    def stored_formats(self) -> ModelQuantization:
        return UNQUANTIZED

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

    def quantized(self, name: str, quantization: Quantization) -> QuantizedTensor | None:  # noqa: ARG002
        return None

    def _place(self, name: str) -> tuple[Path, str]:
        try:
            return self._places[name]
        except KeyError:
            raise CheckpointError(
                f"the weights lack the tensor {name} that config.json asks for: download or convert them again"
            ) from None

    @cached_property
    def _places(self) -> dict[str, tuple[Path, str]]:
        """Name on the hub -> the tensor's file, and its name in that file."""
        family = family_of(self.model_config.architecture)
        places = dict[str, tuple[Path, str]]()
        for path, stored in self._stored.items():
            for name in stored:
                on_hub = family.hub_name(name)
                if on_hub in places:
                    raise CheckpointError(
                        f"{path.name}: {places[on_hub][1]} and {name} are two names of one tensor: "
                        "convert the checkpoint again"
                    )
                places[on_hub] = (path, name)
        return places

    @property
    def _single(self) -> bool:
        """Whether the weights are in one file. It goes before an index beside it, as in transformers."""
        return (self.path / SINGLE).exists() or not (self.path / INDEX).exists()

    @cached_property
    def _stored(self) -> dict[Path, list[str]]:
        """The names of the tensors of every file, in the order of the file."""
        if self._single:
            return {self.path / SINGLE: _names_in(self.path / SINGLE)}
        return _sharded(self.path / INDEX)

    def _check_names(self) -> None:
        """A tensor that the architecture does not have means that this code would compute another model."""
        config = self.model_config
        expected = stage_specs(config, StageSpec.everything(config), "float32")  # for the names alone
        left_over = sorted(self.names() - set(expected))
        for name in left_over:
            if not name.endswith("inv_freq") and not (name == LM_HEAD and config.tied_embeddings):
                raise CheckpointError(f"{config.architecture} has no tensor {name}: config.json and weights disagree")

    def _settled(self) -> dict[str, Any]:
        """config.json with what transformers takes from the weights in place of its entries.

        The dtype of the first weights where config.json names none; no tied embeddings where another head is stored.
        """
        config = dict(self.config)
        if not (config.get("dtype") or config.get("torch_dtype")):
            config["dtype"] = self._first_dtype()
        if self._has_other_head():
            log.warning("%s asks for tied embeddings, but the weights have another %s: it is used", CONFIG, LM_HEAD)
            config["tie_word_embeddings"] = False
            if config.get("text_config"):
                config["text_config"] = {**config["text_config"], "tie_word_embeddings": False}
        return config

    def _has_other_head(self) -> bool:
        """Whether embeddings are tied by config.json, but a head with other numbers is stored."""
        if not self.model_config.tied_embeddings or not {LM_HEAD, EMBEDDING} <= self.names():
            return False
        return not torch.equal(self.tensor(LM_HEAD), self.tensor(EMBEDDING))

    def _first_dtype(self) -> str:
        """The type of the first weights in the first file that are of a floating type."""
        first = min(self._stored)
        with _opened(first) as file:
            codes = [file.get_slice(name).get_dtype() for name in self._stored[first]]
        return next((DTYPES[code] for code in codes if code in DTYPES), "float32")


def _names_in(path: Path) -> list[str]:
    if not path.exists() and not path.is_symlink():
        legacy = any(path.parent.glob("pytorch_model*.bin"))
        remedy = "convert its pytorch_model.bin to safetensors first" if legacy else "is the download complete?"
        raise CheckpointError(f"{path.parent.name} has no {path.name}: {remedy}")
    with _opened(path) as file:
        return list(file.keys())


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A short-lived mapping of a file. Tensors that were read keep their own mapping."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError):
        refuse_damaged(path)


def _sharded(index: Path) -> dict[Path, list[str]]:
    """The names of the tensors of every file that an index names. Raises CheckpointError where the two differ."""
    indexed: dict[str, set[str]] = {}
    for name, file in _weight_map(index).items():
        indexed.setdefault(file, set()).add(name)
    for file in indexed:
        if not (index.parent / file).exists():
            raise CheckpointError(f"{index.parent.name} lacks {file} of {index.name}: is the download complete?")
    stored = {index.parent / file: _names_in(index.parent / file) for file in sorted(indexed)}
    for path, names in stored.items():
        if differing := indexed[path.name].symmetric_difference(names):
            raise CheckpointError(
                f"{index.name} and {path.name} disagree about {min(differing)}: download both again, from one place"
            )
    return stored


def _weight_map(path: Path) -> dict[str, str]:
    files = read_json(path).get("weight_map")
    if not files or not isinstance(files, dict) or not all(map(_is_name, files.values())):
        raise CheckpointError(f"{path.name} is damaged: download it again")
    return files


def _is_name(file: object) -> bool:
    """Whether it is the name of a file in the same folder."""
    return isinstance(file, str) and Path(file).name == file and file.endswith(".safetensors")
