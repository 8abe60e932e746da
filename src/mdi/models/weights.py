"""The tensors of a stage. One pass over a model's constructors declares them, the same pass loads them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from mdi.core.dtypes import parse_dtype
from mdi.core.tensors import GetTensor, Specs, TensorSpec
from mdi.models.config import ModelConfig, StageSpec
from mdi.models.decoder import EMBEDDING, Decoder
from mdi.models.registry import VisionTower, family_of


@dataclass(frozen=True)
class LoadedStage:
    """A stage's weights, ready to compute. dtype: of activations and KV cache. vision: None where it has no tower."""

    config: ModelConfig
    spec: StageSpec
    dtype: torch.dtype
    device: torch.device
    decoder: Decoder
    vision: VisionTower | None


def load_stage(
    config: ModelConfig, spec: StageSpec, dtype: torch.dtype, device: torch.device, get: GetTensor
) -> LoadedStage:
    """A stage made of the tensors that `get` gives, got in the order that data flows through them."""
    embedding = get(EMBEDDING, (config.vocab_size, config.hidden_size)) if spec.embedding else None
    tower = family_of(config.architecture).vision_tower
    vision = tower(config.vision, get) if spec.vision and tower and config.vision else None
    return LoadedStage(config, spec, dtype, device, Decoder(config, spec, embedding, get), vision)


def stage_specs(config: ModelConfig, spec: StageSpec, dtype: str) -> Specs:
    """Every tensor of a stage that is computed in `dtype`: exactly these, nothing missing, nothing left over.

    With tied embeddings a head's matrix is stored under the embedding's name, in the first and in the last chunk.
    Raises CheckpointError for a dtype that models are not computed in.
    """
    return dict(_declared(config, spec, dtype))


@lru_cache(maxsize=256)
def _declared(config: ModelConfig, spec: StageSpec, dtype: str) -> Specs:
    """Loads a stage of tensors without contents (torch's device "meta"), and keeps what it is loaded with."""
    specs: Specs = {}

    def declare(name: str, shape: tuple[int, ...], own_dtype: str | None = None) -> Tensor:
        specs[name] = TensorSpec(shape, own_dtype or dtype)
        return torch.empty(shape, device="meta")

    load_stage(config, spec, parse_dtype(dtype), torch.device("meta"), declare)
    return specs
