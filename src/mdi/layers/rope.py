"""Rotary positions: 1-D and multimodal (M-RoPE) for the decoder, 2-D for the vision tower. Pure functions of positions.

M-RoPE: arXiv:2409.12191, section 2.1. A text token has the same position on all three axes (t, h, w). A token of an
image has its frame, row and column, plus the position where the image starts. The token after it has the highest
position so far plus one. Video follows transformers 4 (`get_rope_index` there): the frame index counts as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Grid = tuple[int, int, int]  # patches of one image or video: frames, rows, columns, before merging


@dataclass(frozen=True)
class MediaSpan:
    """The tokens of an image or a video in a prompt: `length` of them from `start`, in a merged grid.

    time_step: positions along time from one grid to the next.
    """

    start: int
    grid: Grid
    merge_size: int
    time_step: float = 1.0

    @property
    def merged(self) -> Grid:
        frames, rows, columns = self.grid
        return frames, rows // self.merge_size, columns // self.merge_size

    @property
    def length(self) -> int:
        frames, rows, columns = self.merged
        return frames * rows * columns


def prompt_positions(length: int, spans: Sequence[MediaSpan]) -> tuple[Tensor, int]:
    """Positions of a prompt and its rope delta.

    spans: in order of their start, not overlapping. Returns int64 [3, length] and delta, the difference between the
    next token's position and its index: token i after the prompt has position i + delta on all axes.
    """
    pieces: list[Tensor] = []
    index = position = 0
    for span in spans:
        gap = span.start - index
        pieces += [text_positions(position, gap), _grid_positions(span) + (position + gap)]
        position = int(pieces[-1].max()) + 1
        index = span.start + span.length
    pieces.append(text_positions(position, length - index))
    next_position = position + length - index
    return torch.cat(pieces, dim=1), next_position - length


def text_positions(start: int, length: int) -> Tensor:
    """Positions of text, the same on all three axes: int64 [3, length]."""
    return torch.arange(start, start + length).expand(3, length)


def _grid_positions(span: MediaSpan) -> Tensor:
    """(t, h, w) of every cell of a grid, row-major: int64 [3, cells]. Along time, parts of positions are dropped."""
    cells = torch.cartesian_prod(*(torch.arange(size) for size in span.merged)).reshape(-1, 3).T
    if span.time_step != 1:
        cells[0] = (cells[0] * span.time_step).long()
    return cells


@dataclass(frozen=True)
class Rotation:
    """What rotates queries and keys: cosines and sines of each token's angles, float32 [tokens, head_dim / 2]."""

    cos: Tensor
    sin: Tensor

    def __getitem__(self, rows: slice) -> Rotation:
        return Rotation(self.cos[rows], self.sin[rows])

    def __call__(self, x: Tensor) -> Tensor:
        """Rotates x: [tokens, heads, head_dim]. The second half of the channels is paired with the first."""
        first, second = x.chunk(2, -1)
        cos, sin = self.cos[:, None], self.sin[:, None]
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


@dataclass(frozen=True)
class RopeScaling:
    """How frequencies are changed for sequences longer than those of the training, trained_positions.

    linear: all are divided by `factor`. llama3: slow ones are, those in between in part (Llama 3.1; low_freq_factor and
    high_freq_factor are the turns in trained_positions that bound them). yarn: the same by channels, from beta_fast
    turns to beta_slow ones (arXiv:2309.00071); attention_factor multiplies cosines and sines, truncate widens the
    bounds to whole channels. As in transformers' `modeling_rope_utils.py`.
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    trained_positions: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True

    def applied(self, frequencies: Tensor, theta: float) -> Tensor:
        """float32 [head_dim / 2] -> the same."""
        if self.kind == "linear":
            return frequencies / self.factor
        kept = self._kept_turns(frequencies) if self.kind == "llama3" else self._kept_channels(len(frequencies), theta)
        return kept * frequencies + (1 - kept) * frequencies / self.factor

    def _kept_turns(self, frequencies: Tensor) -> Tensor:
        """How far each channel keeps its frequency, by its turns in trained_positions: from 0 to 1."""
        turns = self.trained_positions * frequencies / (2 * math.pi)
        return ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)

    def _kept_channels(self, n_channels: int, theta: float) -> Tensor:
        """The same by its place between the channels that make beta_fast and beta_slow turns."""

        def channel(turns: float) -> float:
            return n_channels * math.log(self.trained_positions / (turns * 2 * math.pi)) / math.log(theta)

        first, last = channel(self.beta_fast), channel(self.beta_slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, 2 * n_channels - 1)
        ramp = (torch.arange(n_channels, dtype=torch.float32) - first) / (last - first if last != first else 0.001)
        return 1 - ramp.clamp(0, 1)


@dataclass(frozen=True)
class RopeConfig:
    """How a decoder rotates by position.

    kind: "default" rotates all channels by the first axis of positions; "mrope" gives each axis (t, h, w) its own
    channels, so many as `sections` says, in order: together head_dim / 2. theta: base of the frequencies. interleaved:
    channels are of t, h and w in turn; those that are left over are of t (Qwen3-VL, `recomposition_frequencies`).
    """

    kind: Literal["default", "mrope"]
    theta: float
    sections: tuple[int, int, int] | None = None
    scaling: RopeScaling | None = None
    interleaved: bool = False

    def axes(self, n_channels: int) -> Tensor:
        """The axis that each channel is rotated by: int64 [n_channels]."""
        if self.kind == "default" or self.sections is None:
            return torch.zeros(n_channels, dtype=torch.int64)
        if self.interleaved:
            axes = torch.zeros(n_channels, dtype=torch.int64)
            for axis in (1, 2):
                axes[axis : 3 * self.sections[axis] : 3] = axis
            return axes
        return torch.repeat_interleave(torch.arange(3), torch.tensor(self.sections))


class DecoderRope:
    """Rotations for the decoder's positions."""

    def __init__(self, head_dim: int, config: RopeConfig, device: torch.device) -> None:
        channels = torch.arange(0, head_dim, 2, dtype=torch.float32)
        frequencies = 1.0 / config.theta ** (channels / head_dim)
        scaling = config.scaling
        self.frequencies = (scaling.applied(frequencies, config.theta) if scaling else frequencies).to(device)
        self.factor = scaling.attention_factor if scaling else 1.0
        self.axes = config.axes(head_dim // 2).to(device)

    def __call__(self, positions: Tensor) -> Rotation:
        """positions: int64 [3, tokens]."""
        angles = positions.to(torch.float32)[self.axes].T.contiguous() * self.frequencies  # [tokens, head_dim / 2]
        if self.factor == 1:
            return Rotation(angles.cos(), angles.sin())
        return Rotation(angles.cos() * self.factor, angles.sin() * self.factor)


def vision_rotation(
    grid: Grid, merge_size: int, head_dim: int, device: torch.device, theta: float = 10000.0
) -> Rotation:
    """Rotations of the patches of one image or video, in merge order: half of the channels by row, half by column.

    Float32, as in the reference (`apply_rotary_pos_emb_vision`).
    """
    frames, rows, columns = grid
    channels = torch.arange(0, head_dim // 2, 2, dtype=torch.float32)
    frequencies = 1.0 / theta ** (channels / (head_dim // 2))  # [head_dim / 4]
    cells = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))  # row-major (row, column)
    blocks = cells.view(rows // merge_size, merge_size, columns // merge_size, merge_size, 2)
    merge_order = blocks.transpose(1, 2).reshape(-1, 2).repeat(frames, 1).to(torch.float32)
    angles = (merge_order[:, :, None] * frequencies).flatten(1)  # [patches, head_dim / 2]
    return Rotation(angles.cos().to(device), angles.sin().to(device))
