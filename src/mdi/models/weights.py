"""The tensors of a stage. One pass over a model's constructors declares them, the same pass loads them."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from functools import lru_cache
from math import lcm, prod

import torch
from torch import Tensor

from mdi.core.dtypes import parse_dtype
from mdi.core.quantization import FORMATS, UNQUANTIZED, ModelQuantization, Quantization
from mdi.core.tensors import GetTensor, Specs, TensorSpec
from mdi.models.config import ModelConfig, StageSpec
from mdi.models.decoder import EMBEDDING, LAYERS, LM_HEAD, Decoder
from mdi.models.parts import Parts
from mdi.models.registry import VisionTower, family_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedStage:
    """A stage's weights, ready to compute. dtype: of activations and KV cache. vision: None where it has no tower.

    config: of the model.
    """

    config: ModelConfig
    spec: StageSpec
    dtype: torch.dtype
    device: torch.device
    decoder: Decoder
    vision: VisionTower | None
    quantization: ModelQuantization = UNQUANTIZED

    @property
    def parts(self) -> Parts:
        """What a rank has of the stage. `parts.config` is of its layers: fewer heads, narrower MLPs."""
        return Parts.of(self.config, self.spec, self.quantization)


def load_stage(
    config: ModelConfig,
    spec: StageSpec,
    device: torch.device,
    get: GetTensor,
    quantization: ModelQuantization = UNQUANTIZED,
) -> LoadedStage:
    """A stage made of the tensors that `get` gives, got in the order that data flows through them.

    Of a rank's: they are its parts. Raises ConfigError where a model cannot be cut for the spec's rank.
    """
    parts = Parts.of(config, spec, quantization)
    embedding = get(EMBEDDING, (config.vocab_size, config.hidden_size)) if spec.embedding else None
    tower = family_of(config.architecture).vision_tower
    vision = tower(config.vision, get) if spec.vision and tower and config.vision else None
    tied_head = has_tied_head(config, quantization)
    decoder = Decoder(parts.config, spec, embedding, get, tied_head=tied_head)
    return LoadedStage(config, spec, get.dtype, device, decoder, vision, quantization)


def has_tied_head(config: ModelConfig, quantization: ModelQuantization) -> bool:
    """Whether the head's matrix is the embedding's: a quantised head is another one."""
    return config.tied_embeddings and format_of(LM_HEAD, config.hidden_size, quantization) is None


def stage_specs(
    config: ModelConfig, spec: StageSpec, dtype: str, quantization: ModelQuantization = UNQUANTIZED
) -> Specs:
    """Every tensor of a stage that is computed in `dtype`: exactly these, nothing missing, nothing left over.

    Of a rank of a group these are its parts. A quantised matrix has its format in place of a dtype. With tied
    embeddings a head's matrix is stored under the embedding's name, in the first and in the last chunk, unless it is
    quantised.
    Raises CheckpointError for a dtype that models are not computed in, ConfigError as `load_stage`.
    """
    return dict(_declared(config, spec, dtype, quantization).specs)


def log_unquantized(config: ModelConfig, quantization: ModelQuantization) -> None:
    """Names the matrices that stay as they are in a part that is quantised, if there are any."""
    names = list(_declared(config, StageSpec.everything(config), config.dtype, quantization).left)
    if quantization.head and has_tied_head(config, quantization):
        names.append(LM_HEAD)
    if names:
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        log.warning("%s%s: not quantised, because the width is no multiple of the group", names[0], others)


def format_of(name: str, inputs: int, quantization: ModelQuantization) -> Quantization | None:
    """The format of a matrix; None where it is not quantised: groups of weights and of activations are whole."""
    asked = FORMATS.get(_part_format(name, quantization) or "")
    if asked is None or name in quantization.kept or inputs % lcm(asked.group or 1, asked.activation_group):
        return None
    return asked


def _part_format(name: str, quantization: ModelQuantization) -> str | None:
    if name == EMBEDDING:
        return None
    if name == LM_HEAD:
        return quantization.head
    return quantization.layers if name.startswith(LAYERS) else quantization.vision


@lru_cache(maxsize=256)
def _declared(config: ModelConfig, spec: StageSpec, dtype: str, quantization: ModelQuantization) -> _Declared:
    """Loads a stage of tensors without contents (torch's device "meta"), and keeps what it is loaded with."""
    declared = _Declared(parse_dtype(dtype), dtype, quantization)
    load_stage(config, spec, torch.device("meta"), declared, quantization)
    return declared


@dataclass(frozen=True)
class _Declared:
    """A `GetTensor` that keeps what it is asked for. left: matrices that have no format, though their part has one."""

    dtype: torch.dtype
    dtype_name: str
    quantization: ModelQuantization
    specs: Specs = field(default_factory=dict)
    left: list[str] = field(default_factory=list)

    def __call__(self, name: str, shape: tuple[int, ...], dtype: str | None = None, /) -> Tensor:
        self.specs[name] = TensorSpec(shape, dtype or self.dtype_name)
        return torch.empty(shape, device="meta")

    def matrix(self, name: str, shape: tuple[int, ...], /) -> Tensor:
        quantization = format_of(name, prod(shape[1:]), self.quantization)
        if quantization is None and _part_format(name, self.quantization):
            self.left.append(name)
        return self(name, shape, quantization.name if quantization else None)
