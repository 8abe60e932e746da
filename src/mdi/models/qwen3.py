"""Qwen3: each head's queries and keys are normalised, and attention has no biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mdi.models.config import DecoderDefaults, ModelConfig

DEFAULTS = DecoderDefaults(n_kv_heads=32, head_dim=128)  # transformers' Qwen3Config


def read_config(config: Mapping[str, Any]) -> ModelConfig:
    """config: the contents of config.json."""
    return ModelConfig.from_hf(config, defaults=DEFAULTS, qk_norm=True)
