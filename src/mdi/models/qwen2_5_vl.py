"""Qwen2.5-VL: the decoder of Qwen2-VL, and a vision transformer whose attention stays within windows in most blocks.

Mathematics of the tower as in transformers' `modeling_qwen2_5_vl.py`: RMSNorm, SwiGLU with biases, attention within
windows of 4 x 4 tokens, and within whole frames in some blocks. Frames of a video stand apart by their seconds
(arXiv:2502.13923, section 2.1).
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mdi.core.tensors import GetTensor, within
from mdi.layers.attention import attend_fully, rotate_in_place
from mdi.layers.linear import Linear
from mdi.layers.norm import RMSNorm
from mdi.layers.rope import Grid, Rotation, vision_rotation
from mdi.models import qwen2_vl
from mdi.models.config import ModelConfig, VisionConfig, check_rope, unusable
from mdi.models.entries import CONFIG, WindowedVisionEntries, rope_entries
from mdi.models.qwen2_vl import DEFAULT_VISION_THETA, ENCODE_ROWS, row_slices

RMS_EPS = 1e-6
ALIASES = qwen2_vl.ALIASES


def read_config(config: Mapping[str, Any]) -> ModelConfig:
    """config: the contents of config.json, in its flat (hub) or nested (transformers 5) form."""
    return qwen2_vl.with_tower(config, _vision_config(config.get("vision_config")))


def _vision_config(part: Any) -> VisionConfig:
    if part is None:
        raise unusable("vision_config is missing")
    entries = WindowedVisionEntries.read(part, CONFIG, "vision_config")
    rope = rope_entries(part, DEFAULT_VISION_THETA, "vision_config.")
    check_rope(rope.kind, ("default", "axial"))
    if entries.hidden_act != "silu":
        raise unusable(f"activation {entries.hidden_act!r} is not supported in the vision tower")
    if entries.hidden_size % (4 * entries.num_heads):
        raise unusable(f"vision_config.hidden_size {entries.hidden_size} is not a multiple of 4 x num_heads")
    window = entries.window_size // entries.patch_size // entries.spatial_merge_size
    if window < 1:
        raise unusable(f"vision_config.window_size {entries.window_size} is smaller than a token")
    return VisionConfig(
        depth=entries.depth,
        width=entries.hidden_size,
        n_heads=entries.num_heads,
        mlp_size=entries.intermediate_size,
        patch_size=entries.patch_size,
        temporal_patch_size=entries.temporal_patch_size,
        merge_size=entries.spatial_merge_size,
        in_channels=qwen2_vl.CHANNELS,
        out_size=entries.out_hidden_size,
        rope_theta=rope.rope_theta,
        window_tokens=window,
        whole_frame_blocks=tuple(entries.fullatt_block_indexes),
        positions_per_second=entries.tokens_per_second,
    )


class VisionTransformer:
    """The vision tower: patch embedding, blocks, merger. Holds weights only. Patches are in the order of windows."""

    def __init__(self, config: VisionConfig, get: GetTensor) -> None:
        get, merged = within("visual.", get), config.merged_width
        kernel = (config.in_channels, config.temporal_patch_size, config.patch_size, config.patch_size)
        self.config = config
        self.patch_embed = Linear.load(get, {"patch_embed.proj": config.width}, *kernel)
        self.blocks = [VisionBlock(config, within(f"blocks.{index}.", get)) for index in range(config.depth)]
        self.merger_norm = RMSNorm(get, "merger.ln_q", config.width, RMS_EPS)
        self.merger = (
            Linear.load(get, {"merger.mlp.0": merged}, merged, bias=True, activation="gelu"),
            Linear.load(get, {"merger.mlp.2": config.out_size}, merged, bias=True),
        )

    def encode_steps(self, rows: Tensor, grid: Grid) -> Generator[None, None, Tensor]:
        """Encodes one image or video, and yields between small parts of the work, for the caller to do other work.

        rows: float32 [patches, patch_elements] in merge order. Returns [tokens, out_size] in the weights' dtype.
        """
        config = self.config
        dtype, device = self.merger_norm.weight.dtype, self.merger_norm.weight.device
        order, window_sizes = windows(grid, config.merge_size, config.window_tokens)
        patches = _patches_of(order, config.merge_size**2)
        whole = vision_rotation(grid, config.merge_size, config.head_dim, device, config.rope_theta)
        rotation = Rotation(whole.cos[patches], whole.sin[patches])
        rows = rows[patches]
        hidden = torch.empty(len(rows), config.width, dtype=dtype, device=device)
        for part in row_slices(len(rows)):
            hidden[part] = self.patch_embed(rows[part].to(device, dtype))
            yield
        frame_sizes = [len(rows) // grid[0]] * grid[0]
        for index, block in enumerate(self.blocks):
            sizes = frame_sizes if index in config.whole_frame_blocks else window_sizes
            yield from block.steps(hidden, rotation, sizes)
        embeddings = torch.empty(len(order), config.out_size, dtype=dtype, device=device)
        unit = config.merge_size**2
        for part in row_slices(len(order), ENCODE_ROWS):
            merged = self.merger_norm(hidden[part.start * unit : part.stop * unit]).view(-1, config.merged_width)
            embeddings[order[part]] = self.merger[1](self.merger[0](merged))
            yield
        return embeddings


class VisionBlock:
    """RMSNorm, attention, RMSNorm, SwiGLU with biases, each half with a residual."""

    def __init__(self, config: VisionConfig, get: GetTensor) -> None:
        width, inner = config.width, config.mlp_size
        self.config = config
        self.norm1 = RMSNorm(get, "norm1", width, RMS_EPS)
        self.qkv = Linear.load(get, {"attn.qkv": 3 * width}, width, bias=True)
        self.proj = Linear.load(get, {"attn.proj": width}, width, bias=True)
        self.norm2 = RMSNorm(get, "norm2", width, RMS_EPS)
        self.gate_up = Linear.load(get, {"mlp.gate_proj": inner, "mlp.up_proj": inner}, width, bias=True)
        self.down = Linear.load(get, {"mlp.down_proj": width}, inner, bias=True)

    def steps(self, hidden: Tensor, rotation: Rotation, sizes: Sequence[int]) -> Generator[None, None, None]:
        """Runs the block in place, and yields between small parts of the work.

        hidden: [patches, width]. sizes: patches that attend to each other, part after part.
        """
        patches, heads, head_dim = len(hidden), self.config.n_heads, self.config.head_dim
        qkv = torch.empty(patches, 3, heads, head_dim, dtype=hidden.dtype, device=hidden.device)
        for part in row_slices(patches):
            qkv[part] = self.qkv(self.norm1(hidden[part])).view(-1, 3, heads, head_dim)
            rotate_in_place(qkv[part], rotation[part])
            yield
        attention = torch.empty_like(hidden)
        yield from attend_fully(qkv, sizes, attention)
        for part in row_slices(patches):
            hidden[part] = self.proj.add_to(hidden[part], attention[part])
            gate, others = self.gate_up(self.norm2(hidden[part])).chunk(2, dim=-1)
            hidden[part] = self.down.add_to(hidden[part], functional.silu(gate).mul_(others))
            yield


def windows(grid: Grid, merge_size: int, window_tokens: int) -> tuple[Tensor, list[int]]:
    """The tokens of an image or video, window after window and frame after frame: int64 [tokens]; patches of each.

    Windows of window_tokens x window_tokens tokens cover a frame from its upper left corner; those at its right and
    lower edges may be smaller.
    """
    frames, rows, columns = grid[0], grid[1] // merge_size, grid[2] // merge_size
    across = -(-columns // window_tokens)
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    window = (row // window_tokens * across + column // window_tokens).flatten()
    order = window.argsort(stable=True)
    sizes = (window.bincount() * merge_size**2).tolist()
    each_frame = torch.arange(frames)[:, None] * (rows * columns) + order
    return each_frame.flatten(), sizes * frames


def _patches_of(tokens: Tensor, unit: int) -> Tensor:
    """The patches of tokens, in their order: int64 [tokens * unit]."""
    return (tokens[:, None] * unit + torch.arange(unit)).flatten()
