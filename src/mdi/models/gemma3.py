"""Gemma 3, text: norms before and after attention and MLP, GeGLU, and windows with a rotation of their own.

Mathematics as in transformers' `modeling_gemma3.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field

from mdi.core.entries import Entries
from mdi.models.config import ATTENTION_KINDS, DecoderDefaults, ModelConfig, unusable
from mdi.models.entries import CONFIG, FULL, SLIDING, Size

DEFAULTS = DecoderDefaults(n_kv_heads=4, head_dim=256, max_positions=131072)  # transformers' Gemma3TextConfig
REFUSED = ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention")


class GemmaEntries(Entries):
    """What Gemma's config.json says in its own way. rope_scaling, rope_theta, rope_local_base_freq and
    sliding_window_pattern are older than rope_parameters and layer_types."""

    num_hidden_layers: Size
    hidden_activation: str = "gelu_pytorch_tanh"
    query_pre_attn_scalar: Annotated[float, Field(gt=0)] = 256
    layer_types: list[str] | None = None
    sliding_window_pattern: Annotated[int, Field(ge=1)] = 6
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_theta: float = 1e6
    rope_local_base_freq: float = 1e4
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    use_bidirectional_attention: bool | None = None

    @property
    def kinds(self) -> list[str]:
        """Of the layers: the last of each pattern attends to all tokens."""
        pattern, layers = self.sliding_window_pattern, range(1, self.num_hidden_layers + 1)
        return self.layer_types or [SLIDING if layer % pattern else FULL for layer in layers]

    @property
    def ropes(self) -> dict[str, Any]:
        """`rope_parameters`, for each kind of layer."""
        given = self.rope_parameters or {}
        if other := next((name for name in given if name not in ATTENTION_KINDS), None):
            raise unusable(f"rope_parameters has {other!r}, where {FULL} and {SLIDING} have a rope each")
        return {
            FULL: {"rope_theta": self.rope_theta, **(given.get(FULL) or {}), **(self.rope_scaling or {})},
            SLIDING: {"rope_theta": self.rope_local_base_freq, **(given.get(SLIDING) or {})},
        }


def read_config(config: Mapping[str, Any]) -> ModelConfig:
    """config: the contents of config.json."""
    entries = GemmaEntries.read(config, CONFIG)
    for name in REFUSED:
        if getattr(entries, name):
            raise unusable(f"{name} is set, which is not supported")
    content = {
        "tie_word_embeddings": True,
        **config,
        "hidden_act": entries.hidden_activation,
        "layer_types": entries.kinds,
        "rope_parameters": entries.ropes,
    }
    made = ModelConfig.from_hf(content, defaults=DEFAULTS, qk_norm=True)
    return replace(
        made,
        norm_offset=1.0,
        post_norms=True,
        embedding_scale=made.hidden_size**0.5,
        query_scale=(made.head_dim / entries.query_pre_attn_scalar) ** 0.5,
    )
