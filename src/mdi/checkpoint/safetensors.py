"""Checkpoints in Hugging Face layout: config.json and one or several safetensors files."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from torch import Tensor

from mdi.checkpoint.json_file import read_json, refuse_damaged
from mdi.checkpoint.tensor_file import DTYPES, TensorFile
from mdi.core.errors import CheckpointError
from mdi.core.quantization import UNQUANTIZED, ModelQuantization, Quantization, QuantizedTensor
from mdi.core.tensors import TensorSpec
from mdi.models.config import ModelConfig, StageSpec
from mdi.models.decoder import EMBEDDING, LM_HEAD
from mdi.models.entries import CONFIG
from mdi.models.registry import family_of, read_config
from mdi.models.weights import stage_specs

log = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True)
class ExpertPart:
    """Of a tensor with all experts of a layer: one expert's matrix, transposed if need be, and the outputs of it."""

    expert: int
    outputs: slice
    transposed: bool

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        outputs, inputs = reversed(whole[1:]) if self.transposed else whole[1:]
        return len(range(*self.outputs.indices(outputs))), inputs

    def of(self, tensor: Tensor) -> Tensor:
        matrix = tensor[self.expert]
        return (matrix.T if self.transposed else matrix)[self.outputs]


@dataclass(frozen=True)
class _Place:
    """Where a tensor is: its file, the name that it has there, and which part of it, where not all of it is meant."""

    path: Path
    stored: str
    part: ExpertPart | None = None


@dataclass(frozen=True)
class SafetensorsSource:
    """A `Source` in Hugging Face layout. Opening it reads config.json and the names of the tensors only."""

    path: Path
    config: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> Self:
        """Raises CheckpointError when the folder is no checkpoint of a supported architecture."""
        source = cls(path, read_json(path / CONFIG))
        source._check_names()
        if source._single and (path / INDEX).exists():
            log.warning("%s has %s and %s: the first is used, as in transformers", path.name, SINGLE, INDEX)
        return replace(source, config=source._settled())

    @cached_property
    def model_config(self) -> ModelConfig:
        return read_config(self.config)

    @property
    def home(self) -> Path:
        return self.path

    @property
    def quantization(self) -> ModelQuantization:
        return UNQUANTIZED

    @property
    def is_exact(self) -> bool:
        return True

    @property
    def files(self) -> tuple[Path, ...]:
        index = [] if self._single else [self.path / INDEX]
        return (self.path / CONFIG, *index, *self._stored)

    def names(self) -> frozenset[str]:
        return frozenset(self._places)

    def spec(self, name: str) -> TensorSpec:
        place = self._place(name)
        spec = self._stored[place.path].specs[place.stored]
        return TensorSpec(place.part.shape(spec.shape), spec.dtype) if place.part else spec

    def tensor(self, name: str) -> Tensor:
        """One tensor, mapped from its file: its bytes are read when they are used."""
        place = self._place(name)
        try:
            tensor = self._stored[place.path].tensor(place.stored)
        except OSError:
            refuse_damaged(place.path)
        return place.part.of(tensor) if place.part else tensor

    def quantized(self, name: str, quantization: Quantization) -> QuantizedTensor | None:  # noqa: ARG002
        return None

    def _place(self, name: str) -> _Place:
        try:
            return self._places[name]
        except KeyError:
            raise CheckpointError(
                f"the weights lack the tensor {name} that config.json asks for: download or convert them again"
            ) from None

    @cached_property
    def _places(self) -> dict[str, _Place]:
        """By the name on the hub."""
        family = family_of(self.model_config.architecture)
        places = dict[str, _Place]()
        for path, file in self._stored.items():
            for name, spec in file.specs.items():
                for on_hub, part in parts_on_hub(family.hub_name(name), spec.shape, self.model_config):
                    if on_hub in places:
                        raise CheckpointError(
                            f"{path.name}: {places[on_hub].stored} and {name} are two names of one tensor: "
                            "convert the checkpoint again"
                        )
                    places[on_hub] = _Place(path, name, part)
        return places

    @property
    def _single(self) -> bool:
        """Whether the weights are in one file. It goes before an index beside it, as in transformers."""
        return (self.path / SINGLE).exists() or not (self.path / INDEX).exists()

    @cached_property
    def _stored(self) -> dict[Path, TensorFile]:
        """The files of the weights."""
        if self._single:
            return {self.path / SINGLE: opened(self.path / SINGLE)}
        return _sharded(self.path / INDEX)

    def _check_names(self) -> None:
        """A tensor that the architecture does not have means that this code would compute another model."""
        config = self.model_config
        expected = stage_specs(config, StageSpec.everything(config), "float32")  # for the names alone
        left_over = sorted(self.names() - set(expected))
        for name in left_over:
            if not self._is_ignored(name):
                raise CheckpointError(f"{config.architecture} has no tensor {name}: config.json and weights disagree")

    def _is_ignored(self, name: str) -> bool:
        """Whether a tensor that the architecture does not have changes nothing."""
        return name.endswith("inv_freq") or (name == LM_HEAD and self.model_config.tied_embeddings)

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
        dtypes = [spec.dtype for spec in self._stored[min(self._stored)].specs.values()]
        return next((dtype for dtype in dtypes if dtype in DTYPES.values()), "float32")


def parts_on_hub(name: str, shape: tuple[int, ...], config: ModelConfig) -> list[tuple[str, ExpertPart | None]]:
    """The tensors that a stored one is on the hub, by name, with their parts of it; mostly itself.

    The experts of a layer may be one tensor, the outputs of all gates before those of the up products: [experts,
    outputs, inputs] where transformers 5 saves them as it computes them, [experts, inputs, outputs] in files of
    Qwen3-VL. Sizes tell which of the two it is, as in transformers' `conversion_mapping.py`.
    """
    stem, _, kind = name.rpartition(".")
    if not stem.endswith(".mlp.experts") or len(shape) != 3 or kind not in ("gate_up_proj", "down_proj"):
        return [(name, None)]
    half = config.experts.inner_size if config.experts else 0
    sizes = {"down_proj": (config.hidden_size, half), "gate_up_proj": (2 * half, config.hidden_size)}[kind]
    transposed = shape[1:] != sizes and shape[:0:-1] == sizes
    rows = {"down": slice(None)} if kind == "down_proj" else {"gate": slice(half), "up": slice(half, None)}
    return [
        (f"{stem}.{expert}.{part}_proj.weight", ExpertPart(expert, at, transposed))
        for expert in range(shape[0])
        for part, at in rows.items()
    ]


def opened(path: Path) -> TensorFile:
    """Raises CheckpointError for a file that is missing or damaged."""
    if not path.exists() and not path.is_symlink():
        legacy = any(path.parent.glob("pytorch_model*.bin"))
        remedy = "convert its pytorch_model.bin to safetensors first" if legacy else "is the download complete?"
        raise CheckpointError(f"{path.parent.name} has no {path.name}: {remedy}")
    try:
        return TensorFile.open(path)
    except (SafetensorError, OSError):
        refuse_damaged(path)


def _sharded(index: Path) -> dict[Path, TensorFile]:
    """Every file that an index names. Raises CheckpointError where the two differ."""
    indexed: dict[str, set[str]] = {}
    for tensor, name in _weight_map(index).items():
        indexed.setdefault(name, set()).add(tensor)
    for name in indexed:
        if not (index.parent / name).exists():
            raise CheckpointError(f"{index.parent.name} lacks {name} of {index.name}: is the download complete?")
    stored = {index.parent / name: opened(index.parent / name) for name in sorted(indexed)}
    for path, file in stored.items():
        if differing := indexed[path.name].symmetric_difference(file.specs):
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
