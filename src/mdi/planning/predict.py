"""What stages cost before they run: bytes of memory, and seconds of a step. Reads no files and loads nothing."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import fsum
from operator import attrgetter

from mdi.core.group import Rank
from mdi.core.quantization import UNQUANTIZED, ModelQuantization
from mdi.core.tensors import total_bytes, total_size
from mdi.models.config import ModelConfig, StageSpec
from mdi.models.decoder import EMBEDDING, EXPERTS, LM_HEAD
from mdi.models.parts import Parts
from mdi.models.weights import stage_specs
from mdi.planning.cache import token_bytes
from mdi.planning.hardware import Machine

VISION_SHARE = 0.02
"""Share of the vision tower's weights that counts for a decode step: one encoding serves tens of steps."""

PROMPT_TOKENS = 3.0
"""Tokens of the prompt for each token of the answer in a typical request: an image and some lines about it."""


@dataclass(frozen=True)
class StageSummary:
    """What a stage holds and what one decode step uses of it.

    step_parameters: those that one token is computed with. step_bytes: of the weights that a decode step reads; of
    experts, those that the tokens of a step choose. step_share: their part of those of all stages.
    cache_bytes: of the tokens in the KV cache.
    """

    parameters: int
    size_bytes: int
    step_parameters: float
    step_bytes: float
    step_share: float
    cache_bytes: int

    @property
    def memory_bytes(self) -> int:
        """Of weights and cache together."""
        return self.size_bytes + self.cache_bytes

    def token_s(self, machine: Machine) -> float:
        """Seconds of a machine for a token of the answer, with the part of the prompt that goes with it."""
        return machine.token_s(self.step_bytes) + PROMPT_TOKENS * machine.prompt_token_s(self.step_parameters)


@dataclass(frozen=True)
class StageLoad:
    """Cost of a stage as a function of its layers: `fixed`, and `layer` for each; it has room for `most`."""

    fixed: float
    layer: float
    most: int

    def cost(self, n_layers: int) -> float:
        return self.fixed + n_layers * self.layer


@dataclass(frozen=True)
class NodeNeeds:
    """What a node needs, whatever its number of layers. ends: what it has besides layers; layer: one of its layers.

    most_cache_bytes: of the KV cache of all its layers.
    """

    ends: StageSummary
    layer: StageSummary
    most_cache_bytes: float = math.inf

    def memory_bytes(self, n_layers: int) -> float:
        cache_bytes = min(n_layers * self.layer.cache_bytes, self.most_cache_bytes)
        return self.ends.size_bytes + n_layers * self.layer.size_bytes + cache_bytes

    def load(self, machine: Machine, n_layers: int) -> StageLoad:
        """In seconds for a token of the answer. n_layers: of the model, the most that the node can get."""
        most = bisect_right(range(1, n_layers + 1), machine.memory_bytes, key=self.memory_bytes)
        return StageLoad(self.ends.token_s(machine), self.layer.token_s(machine), most)


def stage_summary(
    config: ModelConfig,
    spec: StageSpec,
    dtype: str,
    cache_tokens: int = 0,
    quantization: ModelQuantization = UNQUANTIZED,
    cache_dtype: str | None = None,
    streams: int = 1,
) -> StageSummary:
    """Counts a stage that is computed in `dtype`.

    cache_tokens: tokens in the KV cache, in cache_dtype or the same. streams: tokens that a decode step computes.
    """
    specs = stage_specs(config, spec, dtype, quantization)
    repeated = specs[LM_HEAD].size if config.tied_embeddings and {EMBEDDING, LM_HEAD} <= specs.keys() else 0
    layers = Parts.of(config, spec, quantization).config
    parameters, _ = _step(config, spec, dtype, quantization, 1)
    _, step_bytes = _step(config, spec, dtype, quantization, streams)
    return StageSummary(
        parameters=total_size(specs.values()) - repeated,
        size_bytes=total_bytes(specs.values()),
        step_parameters=parameters,
        step_bytes=step_bytes,
        step_share=step_bytes / _step(config, StageSpec.everything(config), dtype, quantization, streams)[1],
        cache_bytes=cache_tokens * token_bytes(layers, cache_dtype or dtype, len(spec.layers)),
    )


def layer_summary(
    config: ModelConfig,
    dtype: str,
    cache_tokens: int = 0,
    quantization: ModelQuantization = UNQUANTIZED,
    cache_dtype: str | None = None,
    rank: Rank | None = None,
    streams: int = 1,
) -> StageSummary:
    """A layer as plans count it, which take all layers to be alike: as large as the largest, as fast as the mean.

    rank: that has a part of it. See `stage_summary` for the rest.
    """
    counts = _kinds(config, range(config.n_layers))
    layers = [
        stage_summary(
            config, StageSpec(index, index + 1, rank=rank), dtype, cache_tokens, quantization, cache_dtype, streams
        )
        for index in counts
    ]
    parameters = fsum(count * layer.step_parameters for layer, count in zip(layers, counts.values(), strict=True))
    step_bytes = fsum(count * layer.step_bytes for layer, count in zip(layers, counts.values(), strict=True))
    largest = max(layers, key=attrgetter("size_bytes"))
    return replace(largest, step_parameters=parameters / config.n_layers, step_bytes=step_bytes / config.n_layers)


@lru_cache(maxsize=256)
def _step(
    config: ModelConfig, spec: StageSpec, dtype: str, quantization: ModelQuantization, tokens: int
) -> tuple[float, float]:
    """Parameters and bytes that a decode step reads. The embedding is a row lookup and counts as nothing."""
    parts = {
        StageSpec(0, 0, head=True, rank=spec.rank): 1.0 * spec.head,
        StageSpec(0, 0, vision=True): VISION_SHARE * spec.vision,
        **{
            StageSpec(index, index + 1, rank=spec.rank): float(count)
            for index, count in _kinds(config, spec.layers).items()
        },
    }
    experts_read = config.experts.distinct(tokens) / config.experts.count if config.experts else 1.0
    parameters = size_bytes = 0.0
    for part, weight in parts.items():
        if not weight:
            continue
        for name, tensor in stage_specs(config, part, dtype, quantization).items():
            read = weight * (experts_read if EXPERTS in name else 1.0)
            parameters, size_bytes = parameters + read * tensor.size, size_bytes + read * tensor.size_bytes
    return parameters, size_bytes


def _kinds(config: ModelConfig, layers: Sequence[int]) -> dict[int, int]:
    """How many layers are like each of these: with experts, and with one MLP."""
    mixed = [layer for layer in layers if config.experts_of(layer)]
    others = [layer for layer in layers if not config.experts_of(layer)]
    return {alike[0]: len(alike) for alike in (mixed, others) if alike}
