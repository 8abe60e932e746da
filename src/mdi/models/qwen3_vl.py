"""Qwen3-VL: the decoder of Qwen3 with three interleaved axes of positions, and a tower that feeds its first layers.

Mathematics of the tower as in transformers' `modeling_qwen3_vl.py`: learned positions interpolated to the grid, blocks
as in Qwen2-VL, and beside the last block's output those of some others, each through a merger of its own (DeepStack,
arXiv:2406.04334). A video is its frames, each an image with its time as text before it.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from itertools import pairwise
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from mdi.core.tensors import GetTensor, within
from mdi.layers.linear import Linear
from mdi.layers.norm import LayerNorm
from mdi.layers.rope import Grid, vision_rotation
from mdi.models import qwen2_vl
from mdi.models.config import DecoderDefaults, ExpertsConfig, ModelConfig, VisionConfig, check_rope, unusable
from mdi.models.entries import CONFIG, DeepstackVisionEntries, rope_entries
from mdi.models.qwen2_vl import DEFAULT_VISION_THETA, ENCODE_ROWS, LAYER_NORM_EPS, VisionBlock, row_slices

ALIASES = qwen2_vl.ALIASES
VISION_MARKS = {"vision_start_token_id": 151652, "vision_end_token_id": 151653}  # transformers' Qwen3VLConfig
DEFAULTS = DecoderDefaults(  # transformers' Qwen3VLTextConfig
    rope_theta=5e5,
    n_kv_heads=32,
    head_dim=128,
    mrope_sections=(24, 20, 20),
    mrope_interleaved=True,
    max_positions=128000,
)


def read_config(config: Mapping[str, Any]) -> ModelConfig:
    """config: the contents of config.json."""
    return with_tower(config, DEFAULTS)


def with_tower(
    config: Mapping[str, Any], defaults: DecoderDefaults, experts: ExpertsConfig | None = None
) -> ModelConfig:
    """A decoder of the form of Qwen3's, with the tower."""
    vision = vision_config(config.get("vision_config"))
    top = {**VISION_MARKS, **config}
    part = top.get("text_config")
    made = ModelConfig.from_hf(top, part, defaults=defaults, qk_norm=True, experts=experts, vision=vision)
    if made.vision_start_token_id is None or made.vision_end_token_id is None:
        raise unusable("vision_start_token_id and vision_end_token_id are needed: frames of videos stand between them")
    if len(vision.deepstack_blocks) > made.n_layers:
        raise unusable(
            f"vision_config.deepstack_visual_indexes has {len(vision.deepstack_blocks)} entries for the first decoder "
            f"layers, but there are {made.n_layers}"
        )
    return made


def vision_config(part: Any) -> VisionConfig:
    """part: the tower's entries of config.json. Raises CheckpointError for a tower that is not computed here."""
    if part is None:
        raise unusable("vision_config is missing")
    entries = DeepstackVisionEntries.read(part, CONFIG, "vision_config")
    rope = rope_entries(part, DEFAULT_VISION_THETA, "vision_config.")
    check_rope(rope.kind, ("default", "axial"))
    if entries.hidden_act != "gelu_pytorch_tanh":
        raise unusable(f"activation {entries.hidden_act!r} is not supported in the vision tower")
    if entries.in_channels != qwen2_vl.CHANNELS:
        raise unusable(f"vision_config.in_channels is {entries.in_channels}, but pictures have 3")
    if entries.hidden_size % (4 * entries.num_heads):
        raise unusable(f"vision_config.hidden_size {entries.hidden_size} is not a multiple of 4 x num_heads")
    side = isqrt(entries.num_position_embeddings)
    if side**2 != entries.num_position_embeddings:
        raise unusable(f"vision_config.num_position_embeddings {entries.num_position_embeddings} is not a square")
    return VisionConfig(
        depth=entries.depth,
        width=entries.hidden_size,
        n_heads=entries.num_heads,
        mlp_size=entries.intermediate_size,
        patch_size=entries.patch_size,
        temporal_patch_size=entries.temporal_patch_size,
        merge_size=entries.spatial_merge_size,
        in_channels=entries.in_channels,
        out_size=entries.out_hidden_size,
        rope_theta=rope.rope_theta,
        position_side=side,
        deepstack_blocks=_deepstack_blocks(entries),
        timestamps=True,
    )


def _deepstack_blocks(entries: DeepstackVisionEntries) -> tuple[int, ...]:
    found, name = entries.deepstack_visual_indexes, "vision_config.deepstack_visual_indexes"
    if any(index >= entries.depth for index in found):
        raise unusable(f"{name} is {found}, but the tower has blocks 0 to {entries.depth - 1}")
    if any(first >= second for first, second in pairwise(found)):
        raise unusable(f"{name} is {found}: rising numbers are expected")
    return tuple(found)


class VisionTransformer:
    """The vision tower: patch embedding, positions, blocks, mergers. Holds weights only."""

    def __init__(self, config: VisionConfig, get: GetTensor) -> None:
        get, width, side = within("visual.", get), config.width, config.position_side
        kernel = (config.in_channels, config.temporal_patch_size, config.patch_size, config.patch_size)
        mlp = ("mlp.linear_fc1", "mlp.linear_fc2")
        self.config = config
        self.patch_embed = Linear.load(get, {"patch_embed.proj": width}, *kernel, bias=True)
        self.positions = get("pos_embed.weight", (side**2, width))
        self.blocks = [
            VisionBlock(config, within(f"blocks.{index}.", get), mlp, "tanh_gelu") for index in range(config.depth)
        ]
        self.merger = Merger(config, within("merger.", get), norm_size=width)
        self.deepstack_mergers = {
            block: Merger(config, within(f"deepstack_merger_list.{index}.", get), norm_size=config.merged_width)
            for index, block in enumerate(config.deepstack_blocks)
        }

    def encode_steps(self, rows: Tensor, grid: Grid) -> Generator[None, None, Tensor]:
        """Encodes one image or video, and yields between small parts of the work, for the caller to do other work.

        rows: float32 [patches, patch_elements] in merge order. Returns [tokens, embedding_width] in the weights' dtype:
        a token's embedding, then the features of deepstack_blocks.
        """
        config = self.config
        dtype, device = self.positions.dtype, self.positions.device
        rotation = vision_rotation(grid, config.merge_size, config.head_dim, device, config.rope_theta)
        cells, shares = interpolation(grid, config.merge_size, config.position_side)
        hidden = torch.empty(len(rows), config.width, dtype=dtype, device=device)
        for part in row_slices(len(rows)):
            near = self.positions[cells[part].to(device)]  # [patches, 4, width]
            positions = (near * shares[part, :, None].to(device)).sum(1)
            hidden[part] = self.patch_embed(rows[part].to(device, dtype)).add_(positions.to(dtype))
            yield
        n_tokens = len(rows) // config.merge_size**2
        made = torch.empty(n_tokens, 1 + len(self.deepstack_mergers), config.out_size, dtype=dtype, device=device)
        merged = 0
        for index, block in enumerate(self.blocks):
            yield from block.steps(hidden, rotation, frames=grid[0])
            if index in self.deepstack_mergers:
                merged += 1
                yield from self.deepstack_mergers[index].steps(hidden, made[:, merged])
        yield from self.merger.steps(hidden, made[:, 0])
        return made.flatten(1)


class Merger:
    """Makes a token of merge_size x merge_size patches. norm_size: width of what is normalised, a patch or a token."""

    def __init__(self, config: VisionConfig, get: GetTensor, norm_size: int) -> None:
        merged = config.merged_width
        self.config = config
        self.norm_size = norm_size
        self.norm = LayerNorm(get, "norm", norm_size, LAYER_NORM_EPS)
        self.fc1 = Linear.load(get, {"linear_fc1": merged}, merged, bias=True, activation="gelu")
        self.fc2 = Linear.load(get, {"linear_fc2": config.out_size}, merged, bias=True)

    def steps(self, hidden: Tensor, out: Tensor) -> Generator[None, None, None]:
        """hidden: [patches, width]. out: [tokens, out_size]. Yields between small parts of the work."""
        merged = hidden.view(len(out), self.config.merged_width)
        for part in row_slices(len(out), ENCODE_ROWS):
            normed = self.norm(merged[part].view(-1, self.norm_size)).view(-1, self.config.merged_width)
            out[part] = self.fc2(self.fc1(normed))
            yield


def interpolation(grid: Grid, merge_size: int, side: int) -> tuple[Tensor, Tensor]:
    """Which learned positions a patch takes, and how much of each: int64 and float32 [patches, 4], in merge order.

    The square of side x side positions is stretched over a frame, corner on corner; a patch between four positions
    takes each by its nearness. As in transformers' `get_vision_interpolation_indices_and_weights`.
    """
    frames, rows, columns = grid

    def axis(size: int) -> tuple[Tensor, Tensor]:
        at = torch.arange(size, dtype=torch.float32) * (side - 1) / max(size - 1, 1)
        first = at.floor()
        second = (first + 1).clamp(max=side - 1)
        return torch.stack((first, second), 1).long(), torch.stack((1 - (at - first), at - first), 1)

    (row_cells, row_shares), (column_cells, column_shares) = axis(rows), axis(columns)
    cells = row_cells[:, None, :, None] * side + column_cells[None, :, None, :]  # [rows, columns, 2, 2]
    shares = row_shares[:, None, :, None] * column_shares[None, :, None, :]

    def in_merge_order(table: Tensor) -> Tensor:
        blocks = table.view(rows // merge_size, merge_size, columns // merge_size, merge_size, 4)
        return blocks.transpose(1, 2).reshape(-1, 4).repeat(frames, 1)

    return in_merge_order(cells), in_merge_order(shares)
