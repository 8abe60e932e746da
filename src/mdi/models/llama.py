"""Llama 2 and 3, and models of their form: TinyLlama, SmolLM2, Yi, and others that name the architecture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mdi.models.config import DecoderDefaults, ModelConfig

DEFAULTS = DecoderDefaults(max_positions=2048)  # transformers' LlamaConfig


def read_config(config: Mapping[str, Any]) -> ModelConfig:
    """config: the contents of config.json."""
    return ModelConfig.from_hf(config, defaults=DEFAULTS)
