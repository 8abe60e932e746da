"""Qwen2 and Qwen2.5: text models with biases in attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mdi.models.config import ModelConfig


def read_config(config: Mapping[str, Any]) -> ModelConfig:
    """config: the contents of config.json."""
    return ModelConfig.from_hf(config, qkv_bias=True)
