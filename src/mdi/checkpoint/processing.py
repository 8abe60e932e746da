"""How a checkpoint's images and videos become patches: its processors' settings, checked against its vision tower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mdi.checkpoint.json_file import read_json
from mdi.checkpoint.source import Source
from mdi.core.errors import CheckpointError
from mdi.media import PatchSpec, TimedVideoSpec, VideoSpec
from mdi.models.config import VisionConfig

PROCESSOR = "processor_config.json"  # of transformers 5: all processors' settings, each under its name
IMAGES = "preprocessor_config.json"
VIDEOS = "video_preprocessor_config.json"


def media_specs(
    source: Source, min_pixels: int | None = None, max_pixels: int | None = None
) -> tuple[PatchSpec | None, VideoSpec]:
    """How a checkpoint's images and videos are cut; the former is None for a model that reads text only.

    min_pixels, max_pixels: the server's limits, if any. Raises CheckpointError, naming the file, for settings that are
    missing, wrong, or not those that the vision tower was made for.
    """
    vision = source.model_config.vision
    if vision is None:
        return None, VideoSpec()
    images = _patch_spec(source.path, vision)
    videos = _video_spec(source.path, vision, images)
    return images.with_pixels(min_pixels, max_pixels), videos.with_options(max_pixels=max_pixels)


def _patch_spec(path: Path, vision: VisionConfig) -> PatchSpec:
    """How the images of a tower are cut: from processor_config.json, else preprocessor_config.json."""
    settings, file, part = _settings(path, "image_processor", IMAGES)
    spec = PatchSpec.from_hf(settings, file, part)
    _check_cut(spec, vision, file)
    return spec


def _video_spec(path: Path, vision: VisionConfig, images: PatchSpec) -> VideoSpec:
    """How the videos of a tower are sampled: from processor_config.json, else video_preprocessor_config.json."""
    settings, file, part = _settings(path, "video_processor", VIDEOS)
    if settings:  # frames are scaled and cut as images are
        cut = PatchSpec.from_hf(settings, file, part)
        _check_cut(cut, vision, file)
        for name in ("image_mean", "image_std", "rescale_factor"):
            frames, stills = getattr(cut, name), getattr(images, name)
            if frames != stills:
                raise CheckpointError(f"{file}: {name} of videos is {frames}, but that of images is {stills}")
    return (TimedVideoSpec if vision.timestamps else VideoSpec).from_hf(settings, file, part)


def _settings(path: Path, part: str, file: str) -> tuple[Any, str, str]:
    """A processor's settings, the file they are from, and the key they stand under there.

    The nested ones of processor_config.json win over those of a file of their own, as in transformers.
    """
    nested = read_json(path / PROCESSOR, optional=True).get(part)
    if nested is not None:
        return nested, PROCESSOR, part
    return read_json(path / file, optional=file == VIDEOS), file, ""


def _check_cut(spec: PatchSpec, vision: VisionConfig, file: str) -> None:
    """Raises CheckpointError, with both values, for patches that are not the vision tower's."""
    for name in ("patch_size", "temporal_patch_size", "merge_size"):
        found, expected = getattr(spec, name), getattr(vision, name)
        if found != expected:
            raise CheckpointError(
                f"{file}: {name} is {found}, but the vision tower of config.json has {expected}: "
                "download both again, from one place"
            )
