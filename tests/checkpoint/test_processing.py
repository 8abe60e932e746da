"""Image and video settings come from the checkpoint's files, within the server's limits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mdi.checkpoint.processing import IMAGES, PROCESSOR, VIDEOS, media_specs
from mdi.checkpoint.source import Source, open_source
from mdi.core.errors import CheckpointError
from mdi.media import VideoSpec


def write(path: Path, file: str, **entries: Any) -> None:
    (path / file).write_text(json.dumps(entries))


def test_the_checkpoints_and_the_servers_limits_hold_for_videos(source: Source) -> None:
    assert media_specs(source)[1] == VideoSpec()
    write(source.path, VIDEOS, size={"shortest_edge": 12544, "longest_edge": 50176}, fps=1)
    assert media_specs(source)[1] == VideoSpec(fps=1, min_pixels=12544, max_pixels=50176)
    assert media_specs(source, max_pixels=20_000)[1].max_pixels == 20_000
    assert media_specs(source, max_pixels=10**6)[1].max_pixels == 50176


def test_nested_settings_win_over_those_of_a_file_of_their_own(source: Source) -> None:
    write(source.path, PROCESSOR, image_processor={"size": {"shortest_edge": 784, "longest_edge": 1568}})
    images, _ = media_specs(source)
    assert images is not None
    assert (images.min_pixels, images.max_pixels) == (784, 1568)
    write(source.path, VIDEOS, fps=1)
    write(source.path, PROCESSOR, video_processor={"fps": 3})
    images, videos = media_specs(source)
    assert images is not None
    assert (images.min_pixels, videos.fps) == (3136, 3)


def test_a_model_of_text_has_no_image_settings(text_only: Path) -> None:
    assert media_specs(open_source(text_only)) == (None, VideoSpec())


@pytest.mark.parametrize("text", ["{", "[1]", "\xff"])
@pytest.mark.parametrize("name", [IMAGES, VIDEOS, PROCESSOR])
def test_damaged_files_are_named_with_the_remedy(text: str, name: str, source: Source) -> None:
    (source.path / name).write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=f"^{name} is not a valid JSON object: download it again"):
        media_specs(source)


@pytest.mark.parametrize(
    ("file", "entries", "message"),
    [
        (IMAGES, {"patch_size": 16}, "patch_size is 16, but the vision tower of config.json has 14"),
        (IMAGES, {"merge_size": 1}, "merge_size is 1, but the vision tower of config.json has 2"),
        (IMAGES, {"temporal_patch_size": 1}, "temporal_patch_size is 1, but the vision tower of config.json has 2"),
        (IMAGES, {"patch_size": "14"}, "patch_size should be a valid integer, got '14'"),
        (IMAGES, {"do_resize": False}, "do_resize should be True, got False"),
        (IMAGES, {"resample": 2}, "resample should be 3, got 2"),
        (IMAGES, {"image_std": [1, 0, 1]}, r"image_std\[1\] should be greater than"),
        (IMAGES, {"image_mean": [0.5, 0.5]}, "image_mean: List should have at least 3 items after validation, not 2"),
        (IMAGES, {"min_pixels": 10**5, "max_pixels": 10**4}, "min_pixels is 100000, above max_pixels 10000"),
        (VIDEOS, {"patch_size": 16}, "patch_size is 16, but the vision tower of config.json has 14"),
        (VIDEOS, {"image_mean": 0.5}, "image_mean of videos is .* but that of images is"),
        (VIDEOS, {"fps": 0}, "fps should be greater than 0, got 0"),
        (VIDEOS, {"min_frames": 1000}, "the limits contradict each other"),
        (PROCESSOR, {"image_processor": {"patch_size": 16}}, "patch_size is 16, but the vision tower"),
        (PROCESSOR, {"image_processor": {"size": 1}}, "image_processor.size should be a valid dictionary"),
        (PROCESSOR, {"image_processor": []}, "image_processor is not a JSON object"),
    ],
)
def test_wrong_settings_are_named_with_file_and_entry(
    file: str, entries: dict[str, Any], message: str, source: Source
) -> None:
    write(source.path, file, **entries)
    with pytest.raises(CheckpointError, match=f"^{file}: {message}"):
        media_specs(source)
