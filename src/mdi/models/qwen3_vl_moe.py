"""Qwen3-VL with mixtures of experts: Qwen3-VL's tower and positions, and the decoder of Qwen3-MoE."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mdi.models import qwen3_vl
from mdi.models.config import ModelConfig
from mdi.models.qwen3_moe import read_experts

DEFAULTS = replace(qwen3_vl.DEFAULTS, n_kv_heads=16, head_dim=None)  # transformers' Qwen3VLMoeTextConfig
COUNTS = ("num_experts", "num_local_experts")


def read_config(config: Mapping[str, Any]) -> ModelConfig:
    """config: the contents of config.json. The shares of a token's experts always add up to 1."""
    part = config.get("text_config")
    entries = {"num_experts_per_tok": 4, "moe_intermediate_size": 1408, **(part if isinstance(part, dict) else config)}
    if not any(name in entries for name in COUNTS):
        entries["num_experts"] = 60
    experts = read_experts({**entries, "norm_topk_prob": True}, "text_config")
    return qwen3_vl.with_tower(config, DEFAULTS, experts)
