"""Qwen2-VL's vision transformer: patch rows in, embeddings for the decoder out. Holds weights only.

Mathematics as in transformers' `modeling_qwen2_vl.py`: a matmul over patch rows, pre-LayerNorm blocks with 2-D rotary
positions and attention within each frame, then a merger that turns 2 x 2 neighbours into one token.
"""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch import Tensor
from torch.nn import functional

from mdi.model.config import VisionConfig
from mdi.model.decoder import Get
from mdi.model.linear import Linear
from mdi.model.rope import Grid, Rotation, vision_rotation

LAYER_NORM_EPS = 1e-6


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
        return self.fc2.add_to(hidden, inner.mul_(torch.sigmoid(1.702 * inner)))

    def _attention(self, x: Tensor, rotation: Rotation, frames: int) -> Tensor:
        patches, heads, head_dim = len(x), self.config.n_heads, self.config.head_dim
        qkv = self.qkv(x).view(patches, 3 * heads, head_dim)
        turned = rotation(qkv[:, : 2 * heads].float()).to(x.dtype)
        by_frame = (frames, patches // frames, heads, head_dim)
        queries, keys = (part.reshape(by_frame).transpose(1, 2) for part in turned.chunk(2, dim=1))
        values = qkv[:, 2 * heads :].reshape(by_frame).transpose(1, 2)
        out = functional.scaled_dot_product_attention(queries, keys, values)
        return out.transpose(1, 2).reshape(patches, self.config.width)


class LayerNorm:
    """LayerNorm with weight and bias (arXiv:1607.06450)."""

    def __init__(self, name: str, get: Get) -> None:
        self.weight, self.bias = get(name + ".weight"), get(name + ".bias")

    def __call__(self, x: Tensor) -> Tensor:
        return torch.layer_norm(x, self.weight.shape, self.weight, self.bias, LAYER_NORM_EPS)
