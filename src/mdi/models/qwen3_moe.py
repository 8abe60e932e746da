"""Qwen3-MoE: Qwen3's attention, with mixtures of experts in place of the MLP of all layers or of some."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mdi.models.config import DecoderDefaults, ExpertsConfig, ModelConfig, unusable
from mdi.models.entries import CONFIG, ExpertsEntries

DEFAULTS = DecoderDefaults(n_kv_heads=4)  # transformers' Qwen3MoeConfig


def read_config(config: Mapping[str, Any]) -> ModelConfig:
    """config: the contents of config.json. Where attention slides over a window, it does in all layers."""
    content = {**config, "max_window_layers": 0}
    return ModelConfig.from_hf(content, defaults=DEFAULTS, qk_norm=True, experts=read_experts(config))


def read_experts(part: Mapping[str, Any], where: str = "") -> ExpertsConfig | None:
    """The experts of a decoder; None where no layer has any.

    part: its entries. where: the key that these stand under, for messages. Raises CheckpointError, naming the entry,
    for one that is wrong or contradicts another.
    """
    entries = ExpertsEntries.read(part, CONFIG, where)
    if (other := part.get("num_local_experts")) is not None and other != entries.num_experts:
        raise unusable(f"num_experts is {entries.num_experts}, but num_local_experts is {other}")
    layers = tuple(filter(entries.has_experts, range(entries.num_hidden_layers)))
    if not layers:
        return None
    if entries.num_experts_per_tok > entries.num_experts:
        raise unusable(
            f"num_experts_per_tok is {entries.num_experts_per_tok}, but num_experts is {entries.num_experts}"
        )
    return ExpertsConfig(
        count=entries.num_experts,
        per_token=entries.num_experts_per_tok,
        inner_size=entries.moe_intermediate_size,
        normalised=entries.norm_topk_prob,
        layers=layers,
    )
