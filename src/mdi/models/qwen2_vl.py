"""Qwen2-VL: the decoder of Qwen2 with three axes of positions, and a vision transformer.

Mathematics of the tower as in transformers' `modeling_qwen2_vl.py`: a matmul over patch rows, pre-LayerNorm blocks with
2-D rotary positions and attention within each frame, then a merger that makes one token of 2 x 2 neighbours.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from mdi.core.tensors import GetTensor, within
from mdi.layers.attention import attend_fully, rotate_in_place
from mdi.layers.linear import Linear
from mdi.layers.norm import LayerNorm
from mdi.layers.rope import Grid, Rotation, vision_rotation
from mdi.models.config import DecoderDefaults, ModelConfig, VisionConfig, check_rope, unusable
from mdi.models.entries import CONFIG, VisionEntries, rope_entries

LAYER_NORM_EPS = 1e-6
CHANNELS = 3
ENCODE_ROWS = 512  # patches in one product: more are no faster (docs/performance.md)
DEFAULT_VISION_THETA = 10000.0
DEFAULTS = DecoderDefaults(  # transformers' Qwen2VLTextConfig
    rope_theta=1e6, rms_eps=1e-5, n_kv_heads=8, sliding_from=80, mrope_sections=(16, 24, 24)
)

ALIASES = (
    ("model.language_model.", "model."),
    ("model.visual.", "visual."),
)


def read_config(config: Mapping[str, Any]) -> ModelConfig:
    """config: the contents of config.json, in its flat (hub) or nested (transformers 5) form."""
    return with_tower(config, _vision_config(config.get("vision_config")))


def with_tower(config: Mapping[str, Any], vision: VisionConfig) -> ModelConfig:
    """The decoder of Qwen2-VL and of what came after it, with a tower."""
    made = ModelConfig.from_hf(config, config.get("text_config"), defaults=DEFAULTS, qkv_bias=True, vision=vision)
    if made.q_size != made.hidden_size:
        raise unusable(f"{made.n_heads} heads of {made.head_dim} do not make hidden_size {made.hidden_size}")
    return made


def _vision_config(part: Any) -> VisionConfig:
    if part is None:
        raise unusable("vision_config is missing")
    entries = VisionEntries.read(part, CONFIG, "vision_config")
    rope = rope_entries(part, DEFAULT_VISION_THETA, "vision_config.")
    check_rope(rope.kind, ("default", "axial"))
    if entries.hidden_act != "quick_gelu":
        raise unusable(f"activation {entries.hidden_act!r} is not supported in the vision tower")
    if entries.in_channels != CHANNELS:
        raise unusable(f"vision_config.in_channels is {entries.in_channels}, but pictures have 3")
    if entries.embed_dim % (4 * entries.num_heads):
        raise unusable(f"vision_config.embed_dim {entries.embed_dim} is not a multiple of 4 x num_heads")
    return VisionConfig(
        depth=entries.depth,
        width=entries.embed_dim,
        n_heads=entries.num_heads,
        mlp_size=entries.embed_dim * entries.mlp_ratio,
        patch_size=entries.patch_size,
        temporal_patch_size=entries.temporal_patch_size,
        merge_size=entries.spatial_merge_size,
        in_channels=entries.in_channels,
        out_size=entries.hidden_size,
        rope_theta=rope.rope_theta,
    )


class VisionTransformer:
    """The vision tower: patch embedding, blocks, merger. Holds weights only."""

    def __init__(self, config: VisionConfig, get: GetTensor) -> None:
        get, merged = within("visual.", get), config.merged_width
        kernel = (config.in_channels, config.temporal_patch_size, config.patch_size, config.patch_size)
        self.config = config
        self.patch_embed = Linear.load(get, {"patch_embed.proj": config.width}, *kernel)
        self.blocks = [VisionBlock(config, within(f"blocks.{index}.", get)) for index in range(config.depth)]
        self.merger_norm = LayerNorm(get, "merger.ln_q", config.width, LAYER_NORM_EPS)
        self.merger = (
            Linear.load(get, {"merger.mlp.0": merged}, merged, bias=True, activation="gelu"),
            Linear.load(get, {"merger.mlp.2": config.out_size}, merged, bias=True),
        )

    def encode_steps(self, rows: Tensor, grid: Grid) -> Generator[None, None, Tensor]:
        """Encodes one image or video, and yields between small parts of the work, for the caller to do other work.

        rows: float32 [patches, patch_elements] in merge order. Returns [tokens, out_size] in the weights' dtype.
        """
        dtype, device = self.merger_norm.weight.dtype, self.merger_norm.weight.device
        config = self.config
        rotation = vision_rotation(grid, config.merge_size, config.head_dim, device, config.rope_theta)
        hidden = torch.empty(len(rows), self.config.width, dtype=dtype, device=device)
        for part in row_slices(len(rows)):
            hidden[part] = self.patch_embed(rows[part].to(device, dtype))
            yield
        for block in self.blocks:
            yield from block.steps(hidden, rotation, frames=grid[0])
        embeddings = []
        for part in row_slices(len(rows), ENCODE_ROWS * config.merge_size**2):
            merged = self.merger_norm(hidden[part]).view(-1, config.merged_width)
            embeddings.append(self.merger[1](self.merger[0](merged)))
            yield
        return torch.cat(embeddings)


class VisionBlock:
    """LayerNorm, attention, LayerNorm, MLP, each half with a residual. mlp: names of the MLP's two products."""

    def __init__(
        self,
        config: VisionConfig,
        get: GetTensor,
        mlp: tuple[str, str] = ("mlp.fc1", "mlp.fc2"),
        activation: str = "quick_gelu",
    ) -> None:
        width, inner = config.width, config.mlp_size
        self.config = config
        self.norm1 = LayerNorm(get, "norm1", width, LAYER_NORM_EPS)
        self.qkv = Linear.load(get, {"attn.qkv": 3 * width}, width, bias=True)
        self.proj = Linear.load(get, {"attn.proj": width}, width, bias=True)
        self.norm2 = LayerNorm(get, "norm2", width, LAYER_NORM_EPS)
        self.fc1 = Linear.load(get, {mlp[0]: inner}, width, bias=True, activation=activation)
        self.fc2 = Linear.load(get, {mlp[1]: width}, inner, bias=True)

    def steps(self, hidden: Tensor, rotation: Rotation, frames: int) -> Generator[None, None, None]:
        """Runs the block in place, and yields between small parts of the work.

        hidden: [patches, width], frame after frame.
        """
        patches, heads, head_dim = len(hidden), self.config.n_heads, self.config.head_dim
        qkv = torch.empty(patches, 3, heads, head_dim, dtype=hidden.dtype, device=hidden.device)
        for part in row_slices(patches):
            qkv[part] = self.qkv(self.norm1(hidden[part])).view(-1, 3, heads, head_dim)
            rotate_in_place(qkv[part], rotation[part])
            yield
        attention = torch.empty_like(hidden)
        yield from attend_fully(qkv, [patches // frames] * frames, attention)
        for part in row_slices(patches):
            hidden[part] = self.proj.add_to(hidden[part], attention[part])
            inner = self.fc1(self.norm2(hidden[part]))
            hidden[part] = self.fc2.add_to(hidden[part], inner)
            yield


def row_slices(rows: int, size: int = ENCODE_ROWS) -> Iterator[slice]:
    """Slices of at most `size` rows that together cover `rows`."""
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))
