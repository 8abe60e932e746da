"""The entries of config.json that are used: their types and ranges, and the defaults of transformers' classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AliasChoices, Field

from mdi.core.entries import Entries, TokenId

CONFIG = "config.json"
FULL, SLIDING = "full_attention", "sliding_attention"  # kinds of attention

Size = Annotated[int, Field(ge=1, le=2**24)]


class TopEntries(Entries):
    """What stands at the top of config.json for every model."""

    architectures: Annotated[list[str], Field(min_length=1)]
    model_type: str | None = None
    dtype: str | None = None
    torch_dtype: str | None = None
    tie_word_embeddings: bool = False


class MediaEntries(Entries):
    """The tokens that stand for images and videos."""

    image_token_id: TokenId = 151655
    video_token_id: TokenId = 151656
    vision_start_token_id: TokenId | None = None
    vision_end_token_id: TokenId | None = None


class RopeEntries(Entries):
    """How positions are rotated. type: the older name of rope_type. The others: see `RopeScaling`."""

    rope_type: str | None = None
    type: str | None = None
    rope_theta: Annotated[float, Field(gt=0)]
    mrope_section: list[Annotated[int, Field(ge=0, le=2**16)]] | None = None
    factor: Annotated[float, Field(ge=1)] | None = None
    original_max_position_embeddings: Size | None = None
    low_freq_factor: Annotated[float, Field(gt=0)] | None = None
    high_freq_factor: Annotated[float, Field(gt=0)] | None = None
    beta_fast: Annotated[float, Field(gt=0)] | None = None
    beta_slow: Annotated[float, Field(gt=0)] | None = None
    attention_factor: Annotated[float, Field(gt=0)] | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    partial_rotary_factor: float = 1.0

    @property
    def kind(self) -> str:
        given = self.type if self.rope_type is None else self.rope_type
        return "default" if given is None else given


class DecoderEntries(Entries):
    """A decoder. num_key_value_heads: None is as many as num_attention_heads."""

    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Annotated[int, Field(ge=1, le=1000)]
    num_attention_heads: Size
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    hidden_act: str = "silu"
    max_position_embeddings: Size = 32768
    rms_norm_eps: Annotated[float, Field(ge=0, lt=1)] = 1e-6
    tie_word_embeddings: bool = False
    use_sliding_window: bool | None = False
    sliding_window: Annotated[int, Field(ge=1)] | None = 4096
    attention_bias: bool | None = False
    mlp_bias: bool | None = False
    max_window_layers: int = 28
    layer_types: list[str] | None = None
    pad_token_id: Annotated[int, Field(ge=-1, le=2**24)] | None = None
    dtype: str | None = None
    torch_dtype: str | None = None

    @property
    def attention_kinds(self) -> list[str]:
        """The kind of attention of every layer, as transformers derives it."""
        if self.layer_types is not None:
            return self.layer_types
        sliding = bool(self.use_sliding_window) and self.sliding_window is not None
        n_full = min(max(self.max_window_layers, 0), self.num_hidden_layers) if sliding else self.num_hidden_layers
        return [FULL] * n_full + [SLIDING] * (self.num_hidden_layers - n_full)


class ExpertsEntries(Entries):
    """Qwen3-MoE's mixtures of experts. num_experts: transformers 5 writes it as num_local_experts."""

    num_hidden_layers: Annotated[int, Field(ge=1, le=1000)]
    num_experts: Annotated[int, Field(ge=0, le=4096)] = Field(
        default=128, validation_alias=AliasChoices("num_experts", "num_local_experts")
    )
    num_experts_per_tok: Size = 8
    moe_intermediate_size: Size = 768
    norm_topk_prob: bool = False
    decoder_sparse_step: Size = 1
    mlp_only_layers: list[int] | None = None

    def has_experts(self, layer: int) -> bool:
        """As transformers decides it."""
        dense = layer in (self.mlp_only_layers or [])
        return not dense and self.num_experts > 0 and (layer + 1) % self.decoder_sparse_step == 0


class VisionEntries(Entries):
    """Qwen2-VL's vision tower."""

    depth: Annotated[int, Field(ge=1, le=1000)] = 32
    embed_dim: Size = 1280
    hidden_size: Size = 3584
    hidden_act: str = "quick_gelu"
    mlp_ratio: Annotated[int, Field(ge=1, le=1024)] = 4
    num_heads: Size = 16
    in_channels: Size = 3
    patch_size: Annotated[int, Field(ge=1, le=1024)] = 14
    spatial_merge_size: Annotated[int, Field(ge=1, le=64)] = 2
    temporal_patch_size: Annotated[int, Field(ge=1, le=64)] = 2


class WindowedVisionEntries(Entries):
    """Qwen2.5-VL's vision tower."""

    depth: Annotated[int, Field(ge=1, le=1000)] = 32
    hidden_size: Size = 3584
    out_hidden_size: Size = 3584
    hidden_act: str = "silu"
    intermediate_size: Size = 3420
    num_heads: Size = 16
    patch_size: Annotated[int, Field(ge=1, le=1024)] = 14
    spatial_merge_size: Annotated[int, Field(ge=1, le=64)] = 2
    temporal_patch_size: Annotated[int, Field(ge=1, le=64)] = 2
    tokens_per_second: Annotated[float, Field(gt=0, le=1000, strict=False)] = 4.0
    window_size: Annotated[int, Field(ge=1, le=2**16)] = 112
    fullatt_block_indexes: list[Annotated[int, Field(ge=0)]] = Field(default=[7, 15, 23, 31])


class DeepstackVisionEntries(Entries):
    """Qwen3-VL's vision tower."""

    depth: Annotated[int, Field(ge=1, le=1000)] = 27
    hidden_size: Size = 1152
    out_hidden_size: Size = 3584
    hidden_act: str = "gelu_pytorch_tanh"
    intermediate_size: Size = 4304
    num_heads: Size = 16
    in_channels: Size = 3
    patch_size: Annotated[int, Field(ge=1, le=1024)] = 16
    spatial_merge_size: Annotated[int, Field(ge=1, le=64)] = 2
    temporal_patch_size: Annotated[int, Field(ge=1, le=64)] = 2
    num_position_embeddings: Size = 2304
    deepstack_visual_indexes: list[Annotated[int, Field(ge=0)]] = Field(default=[8, 16, 24])


def rope_entries(part: Mapping[str, Any], default_theta: float, where: str = "") -> RopeEntries:
    """The rope of a decoder or tower: `rope_scaling` (older) before `rope_parameters`, as in transformers."""
    key = "rope_scaling" if part.get("rope_scaling") else "rope_parameters"
    return _rope(part.get(key) or {}, part.get("rope_theta", default_theta), f"{where}{key}")


def decoder_ropes(
    part: Mapping[str, Any], default_theta: float, where: str = ""
) -> tuple[RopeEntries, RopeEntries | None]:
    """The same of a decoder, and that of its layers with a window, where `rope_parameters` has one for each kind."""
    by_kind = part.get("rope_parameters")
    if not isinstance(by_kind, dict) or not by_kind.keys() & {FULL, SLIDING}:
        return rope_entries(part, default_theta, where), None
    theta, key = part.get("rope_theta", default_theta), f"{where}rope_parameters"
    full, sliding = (_rope(by_kind.get(kind) or {}, theta, f"{key}.{kind}") for kind in (FULL, SLIDING))
    return full, sliding


def _rope(given: Any, theta: float, where: str) -> RopeEntries:
    return RopeEntries.read({"rope_theta": theta, **given} if isinstance(given, dict) else given, CONFIG, where)
