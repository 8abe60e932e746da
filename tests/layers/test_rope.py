"""Rotations depend on distances alone, and each channel turns by its own axis."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mdi.layers.rope import DecoderRope, MediaSpan, RopeConfig, prompt_positions, text_positions, vision_rotation

DEFAULT, MROPE = RopeConfig("default", 1e4), RopeConfig("mrope", 1e4, (2, 3, 3))
CPU = torch.device("cpu")


def rotated(config: RopeConfig, x: Tensor, position: tuple[int, int, int]) -> Tensor:
    rotation = DecoderRope(16, config, CPU)(torch.tensor(position)[:, None])
    return rotation(x.double()[None, None])[0, 0]


@pytest.mark.parametrize("config", [DEFAULT, MROPE])
def test_a_product_of_rotated_vectors_depends_on_their_distance_alone(config: RopeConfig) -> None:
    query, key = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    near = float(rotated(config, query, (9, 5, 4)) @ rotated(config, key, (2, 3, 1)))
    far = float(rotated(config, query, (39, 35, 34)) @ rotated(config, key, (32, 33, 31)))
    other = float(rotated(config, query, (9, 5, 4)) @ rotated(config, key, (1, 3, 1)))
    assert near == pytest.approx(far, rel=1e-4)
    assert near != pytest.approx(other, rel=1e-4)


def test_text_is_rotated_alike_by_one_axis_and_by_three() -> None:
    positions = text_positions(7, 5)
    one, three = (DecoderRope(16, config, CPU)(positions) for config in (DEFAULT, MROPE))
    assert torch.equal(one.cos, three.cos)
    assert torch.equal(one.sin, three.sin)


def test_each_section_of_the_channels_has_its_axis() -> None:
    assert MROPE.axes(8).tolist() == [0, 0, 1, 1, 1, 2, 2, 2]
    assert DEFAULT.axes(8).tolist() == [0] * 8
    x = torch.randn(16)
    still, moved = rotated(MROPE, x, (0, 0, 0)), rotated(MROPE, x, (0, 5, 0))
    changed = (still - moved).abs() > 1e-6
    assert changed.nonzero()[:, 0].tolist() == [2, 3, 4, 10, 11, 12]  # the second section, in both halves


def test_some_rows_of_a_rotation_are_those_rows_rotated() -> None:
    rotation = DecoderRope(16, DEFAULT, CPU)(text_positions(0, 10))
    x = torch.randn(10, 3, 16)
    assert torch.equal(rotation(x)[4:6], rotation[slice(4, 6)](x[4:6]))


def test_text_goes_on_above_the_highest_position_of_the_media_before_it() -> None:
    positions, delta = prompt_positions(8, [MediaSpan(start=1, grid=(1, 4, 6), merge_size=2)])
    assert positions.tolist() == [
        [0, 1, 1, 1, 1, 1, 1, 4],
        [0, 1, 1, 1, 2, 2, 2, 4],
        [0, 1, 2, 3, 1, 2, 3, 4],
    ]
    assert delta == 5 - 8


def test_patches_of_a_video_are_rotated_alike_in_every_frame() -> None:
    rotation = vision_rotation((2, 4, 6), merge_size=2, head_dim=16, device=CPU)
    first, second = rotation.cos.chunk(2)
    assert torch.equal(first, second)
    cells = {tuple(row) for row in torch.cat((rotation.cos, rotation.sin), -1)[:24].tolist()}
    assert len(cells) == 24
