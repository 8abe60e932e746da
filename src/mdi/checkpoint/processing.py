"""How a checkpoint's images and videos become patches."""

from __future__ import annotations

from pathlib import Path

from mdi.checkpoint.json_file import read_json
from mdi.media import PatchSpec, VideoSpec


def patch_spec(path: Path, min_pixels: int | None = None, max_pixels: int | None = None) -> PatchSpec:
    """How images are cut, from preprocessor_config.json. min_pixels, max_pixels: the server's limits, if any."""
    config = read_json(path / "preprocessor_config.json", optional=True)
    return PatchSpec.from_hf(config).with_pixels(min_pixels, max_pixels)


def video_spec(path: Path, max_pixels: int | None = None) -> VideoSpec:
    """How videos are sampled, from video_preprocessor_config.json. max_pixels: the server's limit, if any."""
    config = read_json(path / "video_preprocessor_config.json", optional=True)
    return VideoSpec.from_hf(config).with_options(max_pixels=max_pixels)
