"""Qwen2 and Qwen2.5: text models with biases in attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mdi.models.config import DecoderDefaults, ModelConfig

DEFAULTS = DecoderDefaults(n_kv_heads=32)  # transformers' Qwen2Config


def read_config(config: Mapping[str, Any]) -> ModelConfig:
    """config: the contents of config.json."""
    return ModelConfig.from_hf(config, defaults=DEFAULTS, qkv_bias=True)
