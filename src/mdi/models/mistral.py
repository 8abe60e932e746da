"""Mistral and Ministral: the form of Llama, with a window in older versions, or in some layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mdi.models.config import DecoderDefaults, ModelConfig

DEFAULTS = DecoderDefaults(n_kv_heads=8, max_positions=131072, slides=True)  # transformers' MistralConfig


def read_config(config: Mapping[str, Any]) -> ModelConfig:
    """config: the contents of config.json."""
    return ModelConfig.from_hf(config, defaults=DEFAULTS)
