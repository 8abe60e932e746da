"""SmolLM3: the form of Llama, with layers that do not rotate queries and keys (each fourth)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from mdi.core.entries import Entries
from mdi.models.config import DecoderDefaults, ModelConfig, unusable
from mdi.models.entries import CONFIG, FULL, SLIDING

DEFAULTS = DecoderDefaults(rope_theta=2e6, n_kv_heads=4, sliding_window=None)  # transformers' SmolLM3Config


class RotationEntries(Entries):
    """Which layers rotate: those with a 1 in no_rope_layers. Layers that do not are those that may have a window."""

    num_hidden_layers: int
    no_rope_layers: list[int] | None = None
    no_rope_layer_interval: Annotated[int, Field(ge=1)] = 4
    use_sliding_window: bool = False

    @property
    def unrotated(self) -> list[int]:
        layers = range(self.num_hidden_layers)
        if self.no_rope_layers is None:
            return [layer for layer in layers if (layer + 1) % self.no_rope_layer_interval == 0]
        if len(self.no_rope_layers) < len(layers):
            raise unusable(f"no_rope_layers has {len(self.no_rope_layers)} entries, num_hidden_layers is {len(layers)}")
        return [layer for layer in layers if not self.no_rope_layers[layer]]


def read_config(config: Mapping[str, Any]) -> ModelConfig:
    """config: the contents of config.json."""
    entries = RotationEntries.read(config, CONFIG)
    unrotated = entries.unrotated
    slides = unrotated if entries.use_sliding_window and config.get("sliding_window") else []
    types = [SLIDING if layer in slides else FULL for layer in range(entries.num_hidden_layers)]
    content = {"tie_word_embeddings": True, **config, "layer_types": config.get("layer_types") or types}
    return ModelConfig.from_hf(content, defaults=DEFAULTS, unrotated_layers=unrotated)
