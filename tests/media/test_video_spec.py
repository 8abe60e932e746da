"""How many frames of a video are taken, which, and in what size."""

from __future__ import annotations

from typing import Any

import pytest

from mdi.core.errors import CheckpointError, InputError
from mdi.media import VideoSpec

SPEC = VideoSpec()


# How many frames, which, how large


@pytest.mark.parametrize(
    ("total_frames", "video_fps", "options", "taken"),
    [
        (100, 25, {}, 8),  # 4 seconds, 2 frames of each
        (250, 25, {}, 20),
        (330, 30, {"fps": 1}, 10),  # 11, made even
        (30, 30, {}, 4),  # not below min_frames
        (90, 30, {"fps": 1}, 4),
        (3, 30, {}, 2),  # not above what there is
        (2, 30, {}, 2),
        (1, 30, {}, 2),  # twice the same
        (50, 25, {"fps": 100}, 50),
        (51, 25, {"fps": 100}, 50),
        (100_000, 25, {}, 768),  # not above max_frames
        (100, 25, {"nframes": 12}, 12),
        (100, 25, {"nframes": 5}, 4),  # to the nearest even number, half to the even half
        (100, 25, {"nframes": 7}, 8),
        (12, 25, {"nframes": 12}, 12),
    ],
)
def test_as_many_frames_are_taken_as_qwen_vl_utils_takes(
    total_frames: int, video_fps: float, options: dict[str, Any], taken: int
) -> None:
    assert SPEC.with_options(**options).frame_count(total_frames, video_fps) == taken


def test_more_frames_than_there_are_cannot_be_asked_for() -> None:
    with pytest.raises(InputError, match="only 12 frames") as caught:
        SPEC.with_options(nframes=14).frame_count(12, 25)
    assert caught.value.field == "nframes"


@pytest.mark.parametrize(
    ("total_frames", "n_frames", "indices"),
    [
        (10, 4, [0, 3, 6, 9]),
        (6, 4, [0, 2, 3, 5]),
        (100, 2, [0, 99]),
        (4, 4, [0, 1, 2, 3]),
        (1, 2, [0, 0]),
        (3, 4, [0, 1, 1, 2]),
    ],
)
def test_frames_are_spread_from_the_first_to_the_last(total_frames: int, n_frames: int, indices: list[int]) -> None:
    assert SPEC.frame_indices(total_frames, n_frames) == indices


@pytest.mark.parametrize(
    ("size", "n_frames", "options", "resized"),
    [
        ((360, 640), 8, {}, (364, 644)),  # within the limits: to the nearest multiple of 28
        ((1080, 1920), 8, {}, (560, 1008)),  # at most 768 tokens, 602,112 pixels
        ((48, 64), 8, {}, (280, 392)),  # at least 128 tokens, 100,352 pixels
        ((1080, 1920), 768, {}, (224, 420)),  # 24,576 tokens for all are 64 a frame: 1.05 times the least
        ((1080, 1920), 128, {}, (392, 728)),  # 384 tokens a frame, 301,056 pixels
        ((1080, 1920), 8, {"max_pixels": 50_000}, (140, 280)),  # a limit below the least lowers it
        ((1080, 1920), 8, {"max_pixels": 5_000_000}, (560, 1008)),  # a limit above the most does not raise it
        ((1080, 1920), 8, {"total_pixels": 4 * 200_000}, (308, 588)),  # 200,000 pixels for each
        ((48, 64), 8, {"min_pixels": 200_000}, (392, 532)),
        ((48, 64), 8, {"min_pixels": 700_000}, (728, 980)),
    ],
)
def test_frames_are_resized_as_qwen_vl_utils_does_it(
    size: tuple[int, int], n_frames: int, options: dict[str, int], resized: tuple[int, int]
) -> None:
    assert SPEC.with_options(**options).resized(*size, n_frames, factor=28) == resized


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"fps": 0}, "fps"),
        ({"fps": -1.0}, "fps"),
        ({"fps": float("nan")}, "fps"),
        ({"fps": float("inf")}, "fps"),
        ({"fps": "2"}, "fps"),
        ({"fps": True}, "fps"),
        ({"nframes": 1}, "nframes"),
        ({"nframes": 4.0}, "nframes"),
        ({"nframes": True}, "nframes"),
        ({"nframes": [4]}, "nframes"),
        ({"fps": 2, "nframes": 4}, "nframes"),
        ({"min_pixels": 0}, "min_pixels"),
        ({"max_pixels": 783}, "max_pixels"),
        ({"max_pixels": "many"}, "max_pixels"),
        ({"total_pixels": -5}, "total_pixels"),
        ({"min_pixels": 2000, "max_pixels": 1000}, "max_pixels"),
    ],
)
def test_bad_options_are_refused_by_name(options: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError) as caught:
        SPEC.with_options(**options)
    assert caught.value.field == field
    assert field in str(caught.value)


def test_a_checkpoint_s_own_limits_replace_those_of_qwen_vl_utils() -> None:
    assert VideoSpec.from_hf({}) == SPEC
    flat = {"min_pixels": 12544, "max_pixels": 50176, "fps": 1, "min_frames": 2, "max_frames": 16}
    expected = VideoSpec(fps=1, min_frames=2, max_frames=16, min_pixels=12544, max_pixels=50176)
    assert VideoSpec.from_hf(flat) == expected
    assert VideoSpec.from_hf({"size": {"shortest_edge": 12544, "longest_edge": 50176}}).max_pixels == 50176
    assert expected.with_options(max_pixels=10_000).resized(480, 640, 4, 28) == (84, 112)


@pytest.mark.parametrize(
    "config",
    [
        {"min_pixels": 5, "max_pixels": 4},
        {"min_frames": 8, "max_frames": 4},
        {"fps": "fast"},
        {"fps": -1},
        {"size": [1, 2]},
        {"max_frames": {}, "min_frames": 1},
    ],
)
def test_a_checkpoint_s_nonsense_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="video_preprocessor_config"):
        VideoSpec.from_hf(config)
