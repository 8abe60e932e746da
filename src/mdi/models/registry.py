"""The model families, by the architecture that a checkpoint's config.json names."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Protocol

from torch import Tensor

from mdi.core.tensors import GetTensor
from mdi.layers.rope import Grid
from mdi.models import (
    gemma3,
    llama,
    mistral,
    qwen2,
    qwen2_5_vl,
    qwen2_vl,
    qwen3,
    qwen3_moe,
    qwen3_vl,
    qwen3_vl_moe,
    smollm3,
)
from mdi.models.config import ModelConfig, VisionConfig, unusable


class VisionTower(Protocol):
    """A loaded vision encoder: patch rows in, embeddings for the decoder out."""

    def encode_steps(self, rows: Tensor, grid: Grid) -> Generator[None, None, Tensor]:
        """Encodes one image or video, and yields between small parts of the work.

        rows: float32 [patches, patch_elements] in merge order. Returns [tokens, embedding_width].
        """


@dataclass(frozen=True)
class Family:
    """What one family of models adds to the decoder that all share.

    read_config: from the contents of config.json to a config. model_type: the entry that goes with the architecture.
    models: some that people know.
    vision_tower: loads it, where the family has one.
    aliases: (prefix in a file, prefix here) of tensors that some versions of transformers rename. nested: files on the
    hub have these names, not those that tensors have here.
    """

    read_config: Callable[[Mapping[str, Any]], ModelConfig]
    model_type: str
    models: str
    vision_tower: Callable[[VisionConfig, GetTensor], VisionTower] | None = None
    aliases: tuple[tuple[str, str], ...] = ()
    nested: bool = False

    def hub_name(self, name: str) -> str:
        """The name here of a tensor in a file: for most families that on the hub."""
        for alias, prefix in self.aliases:
            if name.startswith(alias):
                return prefix + name.removeprefix(alias)
        return name

    def file_name(self, name: str) -> str:
        """The name in the hub's files of a tensor here."""
        for alias, prefix in self.aliases if self.nested else ():
            if name.startswith(prefix):
                return alias + name.removeprefix(prefix)
        return name


FAMILIES = {
    "Qwen2VLForConditionalGeneration": Family(
        qwen2_vl.read_config,
        "qwen2_vl",
        "Qwen2-VL (2B, 7B, 72B), the bundled model",
        qwen2_vl.VisionTransformer,
        qwen2_vl.ALIASES,
    ),
    "Qwen2_5_VLForConditionalGeneration": Family(
        qwen2_5_vl.read_config,
        "qwen2_5_vl",
        "Qwen2.5-VL (3B, 7B, 72B)",
        qwen2_5_vl.VisionTransformer,
        qwen2_5_vl.ALIASES,
    ),
    "Qwen3VLForConditionalGeneration": Family(
        qwen3_vl.read_config,
        "qwen3_vl",
        "Qwen3-VL (dense: 2B, 4B, 8B, 32B)",
        qwen3_vl.VisionTransformer,
        qwen3_vl.ALIASES,
        nested=True,
    ),
    "Qwen3VLMoeForConditionalGeneration": Family(
        qwen3_vl_moe.read_config,
        "qwen3_vl_moe",
        "Qwen3-VL-30B-A3B, Qwen3-VL-235B-A22B",
        qwen3_vl.VisionTransformer,
        qwen3_vl.ALIASES,
        nested=True,
    ),
    "Qwen2ForCausalLM": Family(qwen2.read_config, "qwen2", "Qwen2, Qwen2.5, Qwen2.5-Coder"),
    "Qwen3ForCausalLM": Family(qwen3.read_config, "qwen3", "Qwen3 (dense)"),
    "Qwen3MoeForCausalLM": Family(qwen3_moe.read_config, "qwen3_moe", "Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder"),
    "LlamaForCausalLM": Family(llama.read_config, "llama", "Llama 2 and 3, TinyLlama, SmolLM2, Yi"),
    "MistralForCausalLM": Family(mistral.read_config, "mistral", "Mistral 7B, Mistral Nemo"),
    "MinistralForCausalLM": Family(mistral.read_config, "ministral", "Ministral 8B"),
    "SmolLM3ForCausalLM": Family(smollm3.read_config, "smollm3", "SmolLM3"),
    "Gemma3ForCausalLM": Family(gemma3.read_config, "gemma3_text", "Gemma 3, text only (270M, 1B)"),
}
GENERATING = ("ForCausalLM", "ForConditionalGeneration")  # how names of architectures with an LM head end
REFUSED = ("per_layer_config", "transformers_weights")  # layers that differ, weights under another name


def family_of(architecture: str) -> Family:
    """Raises CheckpointError, with the supported architectures and the closest of them, for one that no family has."""
    if architecture in FAMILIES:
        return FAMILIES[architecture]
    [closest, *_] = get_close_matches(architecture, FAMILIES, cutoff=0)
    headless = "" if architecture.endswith(GENERATING) else f" (models that write text end with {GENERATING[0]})"
    raise unusable(
        f"architecture {architecture} is not supported{headless}; the closest that is: {closest}; "
        f"all: {', '.join(FAMILIES)}"
    )


def read_config(config: Mapping[str, Any]) -> ModelConfig:
    """Reads the contents of config.json. Raises CheckpointError for a model that is not supported."""
    architectures = config.get("architectures")
    architecture = architectures[0] if isinstance(architectures, list) and architectures else architectures
    family = family_of(str(architecture or "none"))
    kind = config.get("model_type", family.model_type)
    if kind != family.model_type:
        raise unusable(f"model_type is {kind!r}, but {architecture} has {family.model_type!r}")
    for key in REFUSED:
        if config.get(key):
            raise unusable(f"{key} is set, which is not supported")
    return family.read_config(config)
