"""Qwen2-VL's vision transformer: patch rows in, embeddings for the decoder out. Holds weights only.

Mathematics as in transformers' `modeling_qwen2_vl.py`: a matmul over patch rows, pre-LayerNorm blocks with 2-D rotary
positions and attention within each frame, then a merger that turns 2 x 2 neighbours into one token.
"""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch import Tensor
from torch.nn import functional

from mdi.model.attention import attend_fully
from mdi.model.config import VisionConfig
from mdi.model.decoder import Get
from mdi.model.linear import Linear
from mdi.model.rope import Grid, Rotation, vision_rotation

LAYER_NORM_EPS = 1e-6
ROTATED_ROWS = 128
QUICK_GELU = 1.702


class VisionTower:
    """The whole encoder."""

    def __init__(self, config: VisionConfig, get: Get) -> None:
        self.config = config
        kernel = get("visual.patch_embed.proj.weight")
        self.dtype, self.device = kernel.dtype, kernel.device
        self.patch_embed = Linear([kernel.reshape(config.width, config.patch_elements)])
        self.blocks = [VisionBlock(config, f"visual.blocks.{index}.", get) for index in range(config.depth)]
        self.merger_norm = LayerNorm("visual.merger.ln_q", get)
        self.merger = [
            Linear([get(f"visual.merger.mlp.{i}.weight")], [get(f"visual.merger.mlp.{i}.bias")]) for i in (0, 2)
        ]

    def encode_steps(self, rows: Tensor, grid: Grid) -> Generator[None, None, Tensor]:
        """Encodes one image or video, yielding before every block so that the caller can do something else in between.

        rows: float32 [patches, patch_elements] in merge order. Returns [tokens, out_size] in the weights' dtype.
        """
        rotation = vision_rotation(grid, self.config.merge_size, self.config.head_dim, self.device)
        hidden = self.patch_embed(rows.to(self.device, self.dtype))
        for block in self.blocks:
            yield
            hidden = block.forward(hidden, rotation, frames=grid[0])
        merged = self.merger_norm(hidden).view(-1, self.config.merged_width)
        return self.merger[1](functional.gelu(self.merger[0](merged)))


class VisionBlock:
    """LayerNorm, attention, LayerNorm, MLP with quick-GELU, each half with a residual."""

    def __init__(self, config: VisionConfig, prefix: str, get: Get) -> None:
        self.config = config
        self.norm1 = LayerNorm(prefix + "norm1", get)
        self.qkv = Linear([get(prefix + "attn.qkv.weight")], [get(prefix + "attn.qkv.bias")])
        self.proj = Linear([get(prefix + "attn.proj.weight")], [get(prefix + "attn.proj.bias")])
        self.norm2 = LayerNorm(prefix + "norm2", get)
        self.fc1 = Linear([get(prefix + "mlp.fc1.weight")], [get(prefix + "mlp.fc1.bias")])
        self.fc2 = Linear([get(prefix + "mlp.fc2.weight")], [get(prefix + "mlp.fc2.bias")])

    def forward(self, hidden: Tensor, rotation: Rotation, frames: int) -> Tensor:
        """hidden: [patches, width], whole frames one after the other."""
        hidden = self.proj.add_to(hidden, self._attention(self.norm1(hidden), rotation, frames))
        inner = self.fc1(self.norm2(hidden))
        return self.fc2.add_to(hidden, _quick_gelu(inner))

    def _attention(self, x: Tensor, rotation: Rotation, frames: int) -> Tensor:
        patches, heads, head_dim = len(x), self.config.n_heads, self.config.head_dim
        qkv = self.qkv(x).view(patches, 3 * heads, head_dim)
        turned = _rotate(qkv[:, : 2 * heads], rotation)
        by_frame = (qkv[:, 2 * heads :].transpose(0, 1), *turned.chunk(2))
        split = (part.chunk(frames, dim=1) for part in by_frame)
        return torch.cat([attend_fully(queries, keys, values) for values, queries, keys in zip(*split, strict=True)])


def _rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turns queries and keys in float32, some rows at a time so that the copies stay in the processor's cache.

    x: [patches, heads, head_dim] -> [heads, patches, head_dim] in the same dtype.
    """
    turned = torch.empty(x.shape[1], x.shape[0], x.shape[2], dtype=x.dtype, device=x.device)
    for start in range(0, len(x), ROTATED_ROWS):
        rows = slice(start, start + ROTATED_ROWS)
        turned[:, rows] = Rotation(rotation.cos[rows], rotation.sin[rows])(x[rows].float()).transpose(0, 1)
    return turned


def _quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x) (arXiv:1606.08415), through SiLU: in place, as far as it goes."""
    return functional.silu(x.mul_(QUICK_GELU), inplace=True).mul_(1 / QUICK_GELU)


class LayerNorm:
    """LayerNorm with weight and bias (arXiv:1607.06450)."""

    def __init__(self, name: str, get: Get) -> None:
        self.weight, self.bias = get(name + ".weight"), get(name + ".bias")

    def __call__(self, x: Tensor) -> Tensor:
        return torch.layer_norm(x, self.weight.shape, self.weight, self.bias, LAYER_NORM_EPS)
