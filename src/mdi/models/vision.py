"""Qwen2-VL's vision transformer: patch rows in, embeddings for the decoder out. Holds weights only.

Mathematics as in transformers' `modeling_qwen2_vl.py`: a matmul over patch rows, pre-LayerNorm blocks with 2-D rotary
positions and attention within each frame, then a merger that turns 2 x 2 neighbours into one token.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from mdi.layers.attention import attend_fully
from mdi.layers.linear import Linear
from mdi.layers.rope import Grid, Rotation, vision_rotation
from mdi.models.config import VisionConfig
from mdi.models.decoder import Get

LAYER_NORM_EPS = 1e-6
PART_ROWS = 512  # patches that a linear layer takes at once: from here on more are no faster (docs/performance.md)
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
        """Encodes one image or video, yielding after every small part so that the caller can do something in between.

        rows: float32 [patches, patch_elements] in merge order. Returns [tokens, out_size] in the weights' dtype.
        """
        rotation = vision_rotation(grid, self.config.merge_size, self.config.head_dim, self.device)
        hidden = torch.empty(len(rows), self.config.width, dtype=self.dtype, device=self.device)
        for part in parts(len(rows)):
            hidden[part] = self.patch_embed(rows[part].to(self.device, self.dtype))
            yield
        for block in self.blocks:
            yield from block.steps(hidden, rotation, frames=grid[0])
        merged = self.merger_norm(hidden).view(-1, self.config.merged_width)
        embeddings = []
        for part in parts(len(merged)):
            embeddings.append(self.merger[1](functional.gelu(self.merger[0](merged[part]))))
            yield
        return torch.cat(embeddings)


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

    def steps(self, hidden: Tensor, rotation: Rotation, frames: int) -> Generator[None, None, None]:
        """Runs the block in place, yielding after every part. hidden: [patches, width], whole frames in a row."""
        patches, heads, head_dim = len(hidden), self.config.n_heads, self.config.head_dim
        values = torch.empty(heads, patches, head_dim, dtype=hidden.dtype, device=hidden.device)
        turned = torch.empty(2 * heads, patches, head_dim, dtype=hidden.dtype, device=hidden.device)
        for part in parts(patches):
            qkv = self.qkv(self.norm1(hidden[part])).view(-1, 3 * heads, head_dim)
            _rotate(qkv[:, : 2 * heads], rotation[part], out=turned[:, part])
            values[:, part] = qkv[:, 2 * heads :].transpose(0, 1)
            yield
        attention = torch.empty(patches, heads, head_dim, dtype=hidden.dtype, device=hidden.device)
        for frame in parts(patches, patches // frames):
            queries, keys = turned[:, frame].chunk(2)
            yield from attend_fully(queries, keys, values[:, frame], out=attention[frame])
        for part in parts(patches):
            hidden[part] = self.proj.add_to(hidden[part], attention[part].flatten(1))
            inner = self.fc1(self.norm2(hidden[part]))
            hidden[part] = self.fc2.add_to(hidden[part], _quick_gelu(inner))
            yield


def parts(rows: int, size: int = PART_ROWS) -> Iterator[slice]:
    """Slices of at most `size` that cover so many rows."""
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def _rotate(x: Tensor, rotation: Rotation, out: Tensor) -> None:
    """Turns queries and keys in float32, some rows at a time so that the copies stay in the processor's cache.

    x: [patches, heads, head_dim]; out: [heads, patches, head_dim] in the same dtype.
    """
    for rows in parts(len(x), ROTATED_ROWS):
        out[:, rows] = rotation[rows](x[rows].float()).transpose(0, 1)


def _quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x) (arXiv:1606.08415), through SiLU: in place, as far as it goes."""
    return functional.silu(x.mul_(QUICK_GELU), inplace=True).mul_(1 / QUICK_GELU)


class LayerNorm:
    """LayerNorm with weight and bias (arXiv:1607.06450)."""

    def __init__(self, name: str, get: Get) -> None:
        self.weight, self.bias = get(name + ".weight"), get(name + ".bias")

    def __call__(self, x: Tensor) -> Tensor:
        return torch.layer_norm(x, self.weight.shape, self.weight, self.bias, LAYER_NORM_EPS)
