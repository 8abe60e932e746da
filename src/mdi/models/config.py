"""What config.json says about the mathematics, in its flat (hub) and nested (transformers 5) form. Opens no files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mdi.core.errors import CheckpointError

QWEN2_VL = "Qwen2VLForConditionalGeneration"
QWEN2 = "Qwen2ForCausalLM"
ARCHITECTURES = (QWEN2_VL, QWEN2)


@dataclass(frozen=True)
class VisionConfig:
    """The Qwen2-VL vision transformer. `out_size` is the language model's hidden size."""

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
    """The decoder, and the vision tower if there is one. `mrope_section` is None for 1-D positions."""

    architecture: str
    hidden_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int] | None
    tied_embeddings: bool
    max_positions: int
    dtype: str
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
    def from_hf(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Reads a parsed config.json. Raises CheckpointError for what this project does not compute."""
        architecture = (config.get("architectures") or ["none"])[0]
        if architecture not in ARCHITECTURES:
            raise CheckpointError(
                f"checkpoints of architecture {architecture} are not supported; supported: {', '.join(ARCHITECTURES)}"
            )
        text = {**config, **config.get("text_config", {})}
        rope = {**(text.get("rope_scaling") or {}), **(text.get("rope_parameters") or {})}
        _refuse_unsupported(text, rope)
        vision = _vision_config(config["vision_config"], text["hidden_size"]) if architecture == QWEN2_VL else None
        section = rope.get("mrope_section")
        try:
            return cls(
                architecture=architecture,
                hidden_size=text["hidden_size"],
                n_layers=text["num_hidden_layers"],
                n_heads=text["num_attention_heads"],
                n_kv_heads=text.get("num_key_value_heads") or text["num_attention_heads"],
                head_dim=text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"],
                intermediate_size=text["intermediate_size"],
                vocab_size=text["vocab_size"],
                rms_eps=text.get("rms_norm_eps", 1e-6),
                rope_theta=float(rope.get("rope_theta") or text.get("rope_theta") or 1e6),
                mrope_section=(section[0], section[1], section[2]) if section else None,
                tied_embeddings=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
                max_positions=text.get("max_position_embeddings", 32768),
                dtype=str(config.get("dtype") or config.get("torch_dtype") or text.get("dtype") or "float32"),
                vision=vision,
                image_token_id=config.get("image_token_id") if vision else None,
                video_token_id=config.get("video_token_id") if vision else None,
            )
        except KeyError as missing:
            raise CheckpointError(f"config.json lacks {missing}") from None


def _refuse_unsupported(text: Mapping[str, Any], rope: Mapping[str, Any]) -> None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "mrope"):
        raise CheckpointError(f"RoPE scaling of type {kind!r} is not supported")
    if text.get("use_sliding_window"):
        raise CheckpointError("sliding-window attention is not supported")
    if text.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"activation {text['hidden_act']!r} is not supported in the decoder")


def _vision_config(vision: Mapping[str, Any], hidden_size: int) -> VisionConfig:
    activation = vision.get("hidden_act", "quick_gelu")
    if activation != "quick_gelu":
        raise CheckpointError(f"activation {activation!r} is not supported in the vision tower")
    width = vision.get("embed_dim", 1280)
    return VisionConfig(
        depth=vision.get("depth", 32),
        width=width,
        n_heads=vision.get("num_heads", 16),
        mlp_size=int(width * vision.get("mlp_ratio", 4)),
        patch_size=vision.get("patch_size", 14),
        temporal_patch_size=vision.get("temporal_patch_size", 2),
        merge_size=vision.get("spatial_merge_size", 2),
        in_channels=vision.get("in_channels") or vision.get("in_chans") or 3,
        out_size=vision.get("hidden_size", hidden_size),
    )
