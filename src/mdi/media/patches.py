"""From pictures to the rows of pixels that Qwen2-VL's vision tower reads, equal to transformers'."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from mdi.core.errors import CheckpointError, InputError, MediaError
from mdi.media.entries import PictureEntries

MAX_ASPECT_RATIO = 200
DEFAULT_MAX_TOKENS = 1280  # of one image: 1,003,520 pixels where a token is 28 x 28
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class PatchSpec:
    """How images are resized, scaled and cut for a checkpoint; mean and std, by channel, on a scale of 0 to 1.

    A patch is patch_size x patch_size pixels of temporal_patch_size frames; merge_size x merge_size patches
    become one token of the language model. Images are resized to between min_pixels and max_pixels.
    """

    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    min_pixels: int = 3136
    max_pixels: int = 1003520
    image_mean: tuple[float, float, float] = CLIP_MEAN
    image_std: tuple[float, float, float] = CLIP_STD
    rescale_factor: float = 1 / 255

    @classmethod
    def from_hf(cls, settings: Any, file: str = "preprocessor_config.json", part: str = "") -> PatchSpec:
        """Reads image settings: what `file` holds, or what stands in it under the key `part`.

        max_pixels is the checkpoint's, but not above 1280 tokens: raise it with `with_pixels`.
        Raises CheckpointError, naming the file and the entry, for settings that are wrong or not supported.
        """
        spec = cls._with_entries(PictureEntries.read(settings, file, part))
        if not 0 < spec.min_pixels <= spec.max_pixels:
            raise CheckpointError(f"{file}: min_pixels is {spec.min_pixels}, above max_pixels {spec.max_pixels}")
        ceiling = DEFAULT_MAX_TOKENS * spec.factor**2
        return replace(spec, max_pixels=max(spec.min_pixels, min(spec.max_pixels, ceiling)))

    @classmethod
    def _with_entries(cls, entries: PictureEntries) -> PatchSpec:
        """Without rescaling or normalising, pixels are scaled by 1, or have mean 0 and std 1."""
        least, most = entries.pixel_limits
        mean, std = entries.image_mean, entries.image_std
        return cls(
            patch_size=entries.patch_size,
            temporal_patch_size=entries.temporal_patch_size,
            merge_size=entries.merge_size,
            min_pixels=least or cls.min_pixels,
            max_pixels=most or cls.max_pixels,
            image_mean=(mean[0], mean[1], mean[2]) if entries.do_normalize else (0.0, 0.0, 0.0),
            image_std=(std[0], std[1], std[2]) if entries.do_normalize else (1.0, 1.0, 1.0),
            rescale_factor=entries.rescale_factor if entries.do_rescale else 1.0,
        )

    @property
    def factor(self) -> int:
        """Side of the square of pixels behind one token; the resized height and width are multiples of it."""
        return self.patch_size * self.merge_size

    def with_pixels(self, min_pixels: int | None, max_pixels: int | None) -> PatchSpec:
        """The same spec with another pixel budget; None keeps the present one.

        Raises InputError, naming the field, unless 1 <= min_pixels <= max_pixels and one token fits.
        """
        check_pixels("min_pixels", min_pixels, 1)
        check_pixels("max_pixels", max_pixels, self.factor**2)
        spec = replace(
            self,
            min_pixels=self.min_pixels if min_pixels is None else min_pixels,
            max_pixels=self.max_pixels if max_pixels is None else max_pixels,
        )
        if spec.min_pixels > spec.max_pixels:
            field = "min_pixels" if max_pixels is None else "max_pixels"
            raise InputError(f"min_pixels ({spec.min_pixels}) must not be above max_pixels ({spec.max_pixels})", field)
        return spec

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width that an image of this height and width is resized to (see `smart_resize`)."""
        return smart_resize(height, width, self.factor, self.min_pixels, self.max_pixels)


@dataclass(frozen=True, eq=False)
class Patches:
    """The rows of one image or video, as the vision tower reads them.

    rows: float32 [grid_t * grid_h * grid_w, channels * temporal * patch * patch], in merge order: the
        merge_size^2 patches of a token follow each other.
    grid: patches along time, height and width.
    digest: SHA-256 of the resized pixels and of all that turns them into rows; equal digests mean equal rows.
    seconds: of a video, from one patch to the next along time. times_s: of a video, the middle of each of these.
    """

    rows: npt.NDArray[np.float32]
    grid: tuple[int, int, int]
    digest: bytes
    merge_size: int = 2
    seconds: float | None = None
    times_s: tuple[float, ...] = ()

    @property
    def n_tokens(self) -> int:
        """Tokens it takes in the prompt."""
        return math.prod(self.grid) // self.merge_size**2

    def along_time(self) -> list[Patches]:
        """Those of each grid along time, as those of an image."""
        frames, height, width = self.grid
        parts = np.split(self.rows, frames)
        digests = [hashlib.sha256(self.digest + index.to_bytes(4)).digest() for index in range(frames)]
        return [
            Patches(rows, (1, height, width), digest, self.merge_size)
            for rows, digest in zip(parts, digests, strict=True)
        ]

    def without_rows(self) -> Patches:
        """What is left when they are encoded: the grid and the digest."""
        return replace(self, rows=self.rows[:0].copy())


def image_patches(image: Image.Image, spec: PatchSpec) -> Patches:
    """Resizes an RGB image and cuts it into rows, equal to transformers' Qwen2VLImageProcessorPil.

    A still fills all temporal_patch_size frames of its patches. Raises MediaError for extreme aspect ratios.
    """
    height, width = spec.resized(image.height, image.width)
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))  # uint8 [height, width, 3]
    frame = merge_order(pixels, spec)
    n_patches, n_channels, area = frame.shape
    rows = np.empty((n_patches, n_channels, spec.temporal_patch_size, area), dtype=np.float32)
    for channel, table in enumerate(normalized_bytes(spec)):
        rows[:, channel] = table[frame[:, channel, None]]
    grid = (1, height // spec.patch_size, width // spec.patch_size)
    return Patches(rows.reshape(n_patches, -1), grid, digest_of(pixels, spec), spec.merge_size)


def video_patches(frames: Sequence[Image.Image], spec: PatchSpec) -> Patches:
    """Cuts RGB frames of one size, multiples of `spec.factor`, into rows; temporal_patch_size of them make one patch.

    The last frame is repeated where their number is no multiple of that. A still twice gives `image_patches` of it.
    """
    missing = -len(frames) % spec.temporal_patch_size
    pixels = np.stack([np.asarray(frame) for frame in (*frames, *[frames[-1]] * missing)])
    n_frames, height, width, n_channels = pixels.shape
    grid = (n_frames // spec.temporal_patch_size, height // spec.patch_size, width // spec.patch_size)
    rows = np.empty((grid[0], grid[1] * grid[2], n_channels, spec.temporal_patch_size, spec.patch_size**2), np.float32)
    tables = normalized_bytes(spec)
    for index, frame in enumerate(pixels):
        time_patch, layer = divmod(index, spec.temporal_patch_size)
        patches = merge_order(frame, spec)
        for channel, table in enumerate(tables):
            rows[time_patch, :, channel, layer] = table[patches[:, channel]]
    return Patches(rows.reshape(math.prod(grid), -1), grid, digest_of(pixels, spec), spec.merge_size)


def smart_resize(
    height: int, width: int, factor: int, min_pixels: int, max_pixels: float, *, frames: tuple[int, int] = (1, 1)
) -> tuple[int, int]:
    """Height and width, multiples of `factor`, closest to the image's own within the pixel budget.

    Exactly transformers.models.qwen2_vl.image_processing_qwen2_vl.smart_resize, rounding included. frames: of a video
    whose budget is that of all frames together, as in transformers.models.qwen3_vl: their number, and the one that
    resized frames are counted with.
    Raises MediaError when one side is more than 200 times the other.
    """
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise MediaError(
            f"a picture of {width} x {height} pixels is too long: one side may be at most {MAX_ASPECT_RATIO} times the "
            "other; crop it or split it into several"
        )
    new_height = round(height / factor) * factor
    new_width = round(width / factor) * factor
    n_frames, counted = frames
    if counted * new_height * new_width > max_pixels:
        shrink = math.sqrt((n_frames * height * width) / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif counted * new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (n_frames * height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


def merge_order(pixels: npt.NDArray[np.uint8], spec: PatchSpec) -> npt.NDArray[np.uint8]:
    """A frame [height, width, channels] as [grid_h * grid_w, channels, patch * patch], merge order."""
    height, width, channels = pixels.shape
    merge, patch = spec.merge_size, spec.patch_size
    blocks = pixels.reshape(height // spec.factor, merge, patch, width // spec.factor, merge, patch, channels)
    return np.ascontiguousarray(blocks.transpose(0, 3, 1, 4, 6, 2, 5)).reshape(-1, channels, patch * patch)


def normalized_bytes(spec: PatchSpec) -> npt.NDArray[np.float32]:
    """The normalised value of each of the 256 byte values, by channel [3, 256]; rounded where transformers rounds."""
    rescaled = (np.arange(256, dtype=np.float64) * spec.rescale_factor).astype(np.float32)
    mean = np.array(spec.image_mean, dtype=np.float32)[:, None]
    std = np.array(spec.image_std, dtype=np.float32)[:, None]
    return (rescaled - mean) / std


def digest_of(pixels: npt.NDArray[np.uint8], spec: PatchSpec) -> bytes:
    """SHA-256 of resized pixels and of all that turns them into rows.

    The pixel budget is left out: the size of `pixels` follows from it.
    """
    cut = (pixels.shape, spec.patch_size, spec.temporal_patch_size, spec.merge_size)
    scale = (spec.image_mean, spec.image_std, spec.rescale_factor)
    digest = hashlib.sha256(repr((cut, scale)).encode())
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.digest()


def check_pixels(field: str, value: int | None, low: int) -> None:
    """Raises InputError, naming the field, unless it is None or a whole number from `low` on."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"{field} must be a whole number of pixels, got {value!r}", field)
    if value < low:
        raise InputError(f"{field} must be at least {low}, got {value}", field)
