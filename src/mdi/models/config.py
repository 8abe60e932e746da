"""What is computed: the mathematics of a model, and which part of it a stage has. Opens no files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mdi.core.errors import CheckpointError
from mdi.layers.rope import RopeConfig


@dataclass(frozen=True)
class VisionConfig:
    """A vision transformer. out_size: width of its embeddings, the decoder's hidden size."""

    depth: int
    width: int
    n_heads: int
    mlp_size: int
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    in_channels: int
    out_size: int

    @property
    def head_dim(self) -> int:
        return self.width // self.n_heads

    @property
    def patch_elements(self) -> int:
        """Numbers in one patch row: channels x frames x height x width."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merged_width(self) -> int:
        """Width of the merger: merge_size x merge_size neighbouring patches side by side."""
        return self.width * self.merge_size**2


@dataclass(frozen=True)
class ModelConfig:
    """A model: its decoder, and its vision tower where it has one.

    qkv_bias: the products of queries, keys and values have biases. qk_norm: each head's queries and keys are
    normalised before they are rotated. norm_dtype: of the decoder's norms; None is the stage's dtype.
    tied_embeddings: the LM head's matrix is the embedding's.
    """

    architecture: str
    hidden_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_eps: float
    rope: RopeConfig
    qkv_bias: bool
    qk_norm: bool
    tied_embeddings: bool
    max_positions: int
    dtype: str
    norm_dtype: str | None = None
    vision: VisionConfig | None = None
    image_token_id: int | None = None
    video_token_id: int | None = None

    @property
    def q_size(self) -> int:
        return self.n_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.n_kv_heads * self.head_dim

    @classmethod
    def from_hf(
        cls,
        config: Mapping[str, Any],
        *,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        vision: VisionConfig | None = None,
    ) -> ModelConfig:
        """Reads the entries of config.json that families share, in its flat (hub) and nested (transformers 5) form.

        The other arguments are what a family says of itself. Raises CheckpointError for what no family computes, and
        KeyError for an entry that is missing.
        """
        text = text_config(config)
        rope = {**(text.get("rope_scaling") or {}), **(text.get("rope_parameters") or {})}
        _refuse_unsupported(text, rope)
        return cls(
            architecture=config["architectures"][0],
            hidden_size=text["hidden_size"],
            n_layers=text["num_hidden_layers"],
            n_heads=text["num_attention_heads"],
            n_kv_heads=text.get("num_key_value_heads") or text["num_attention_heads"],
            head_dim=text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"],
            intermediate_size=text["intermediate_size"],
            vocab_size=text["vocab_size"],
            rms_eps=text.get("rms_norm_eps", 1e-6),
            rope=_rope_config(float(rope.get("rope_theta") or text.get("rope_theta") or 1e6), rope),
            qkv_bias=qkv_bias,
            qk_norm=qk_norm,
            tied_embeddings=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
            max_positions=text.get("max_position_embeddings", 32768),
            dtype=str(config.get("dtype") or config.get("torch_dtype") or text.get("dtype") or "float32"),
            vision=vision,
            image_token_id=config.get("image_token_id") if vision else None,
            video_token_id=config.get("video_token_id") if vision else None,
        )


@dataclass(frozen=True)
class StageSpec:
    """The part of a model that a stage has: decoder layers [first_layer, last_layer), half-open, and the ends.

    head: the final norm and the LM head. vision: the vision tower, with the embedding or on a node of its own.
    """

    first_layer: int
    last_layer: int
    embedding: bool = False
    vision: bool = False
    head: bool = False

    @property
    def layers(self) -> range:
        return range(self.first_layer, self.last_layer)

    @classmethod
    def everything(cls, config: ModelConfig) -> StageSpec:
        """The whole model."""
        return cls(0, config.n_layers, embedding=True, vision=config.vision is not None, head=True)


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Entries about the decoder: nested ones, and those of the top level."""
    return {**config, **config.get("text_config", {})}


def _rope_config(theta: float, rope: Mapping[str, Any]) -> RopeConfig:
    section = rope.get("mrope_section")
    return RopeConfig("mrope", theta, (section[0], section[1], section[2])) if section else RopeConfig("default", theta)


def _refuse_unsupported(text: Mapping[str, Any], rope: Mapping[str, Any]) -> None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "mrope"):
        raise CheckpointError(f"RoPE scaling of type {kind!r} is not supported")
    if text.get("use_sliding_window"):
        raise CheckpointError("sliding-window attention is not supported")
    if text.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"activation {text['hidden_act']!r} is not supported in the decoder")
