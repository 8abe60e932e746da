"""How many frames of a video are taken, which, and how large: as qwen-vl-utils does it, and as Qwen3-VL does."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from mdi.core.errors import CheckpointError, InputError, MediaError
from mdi.media.entries import VideoEntries
from mdi.media.patches import check_pixels, smart_resize

FRAME_FACTOR = 2  # the sampled frames are a multiple of it
TOKEN_PIXELS = 28 * 28
MARGIN = 1.05  # the largest area of a frame is at least so many times the smallest


@dataclass(frozen=True)
class VideoSpec:
    """How many frames of a video are taken, and how large; the defaults are those of qwen-vl-utils.

    fps frames of every second are taken, at least min_frames and at most max_frames; or `nframes` of the whole, where
    that is set. Every frame is resized to between min_pixels and max_pixels, so that all together stay about
    total_pixels: a frame may have 2 total_pixels / frames.
    """

    fps: float = 2.0
    nframes: int | None = None
    min_frames: int = 4
    max_frames: int = 768
    min_pixels: int = 128 * TOKEN_PIXELS
    max_pixels: int = 768 * TOKEN_PIXELS
    total_pixels: int = 24576 * TOKEN_PIXELS

    @classmethod
    def from_hf(cls, settings: Any, file: str = "video_preprocessor_config.json", part: str = "") -> VideoSpec:
        """Reads video settings: what `file` holds, or what stands in it under the key `part`.

        Entries that it lacks are as in qwen-vl-utils. Raises CheckpointError, naming the file and the entry, for
        settings that are wrong or contradict each other.
        """
        entries, default = VideoEntries.read(settings, file, part), cls()
        least, most = entries.pixel_limits
        spec = cls(
            fps=entries.fps or default.fps,
            min_frames=entries.min_frames or default.min_frames,
            max_frames=entries.max_frames or default.max_frames,
            min_pixels=least or default.min_pixels,
            max_pixels=most or default.max_pixels,
        )
        if not (FRAME_FACTOR <= spec.min_frames <= spec.max_frames and spec.min_pixels <= spec.max_pixels):
            raise CheckpointError(
                f"{file}: the limits contradict each other: frames from {spec.min_frames} (at least {FRAME_FACTOR}) to "
                f"{spec.max_frames}, pixels from {spec.min_pixels} to {spec.max_pixels}"
            )
        return spec

    def with_options(
        self,
        *,
        fps: float | None = None,
        nframes: int | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        total_pixels: int | None = None,
    ) -> VideoSpec:
        """The same spec with a request's own options; None keeps a value. max_pixels can only lower the limit.

        Raises InputError, naming the field, for what is out of range or contradictory.
        """
        _check_rate(fps, nframes)
        check_pixels("min_pixels", min_pixels, 1)
        check_pixels("max_pixels", max_pixels, TOKEN_PIXELS)
        check_pixels("total_pixels", total_pixels, TOKEN_PIXELS)
        if min_pixels and max_pixels and min_pixels > max_pixels:
            raise InputError(f"min_pixels ({min_pixels}) must not be above max_pixels ({max_pixels})", "max_pixels")
        least = min_pixels or min(self.min_pixels, max_pixels or self.min_pixels)
        ceiling = max(self.max_pixels, int(least * MARGIN))
        return replace(
            self,
            fps=fps or self.fps,
            nframes=nframes,
            min_pixels=least,
            max_pixels=min(max_pixels or ceiling, ceiling),
            total_pixels=total_pixels or self.total_pixels,
        )

    def check_frames(self, n_frames: int) -> None:
        """Raises MediaError for a number of frames, given as images, that no video may have."""
        if not 0 < n_frames <= self.max_frames:
            raise MediaError(f"a video may have 1 to {self.max_frames} frames, and this one has {n_frames}", "video")

    def frame_count(self, total_frames: int, video_fps: float) -> int:
        """How many of a file's frames are taken, by qwen_vl_utils' `smart_nframes`; a single frame is taken twice.

        Raises InputError when `nframes` asks for more than there are.
        """
        if self.nframes is not None:
            count = round(self.nframes / FRAME_FACTOR) * FRAME_FACTOR
            if count > total_frames:
                raise InputError(f"nframes is {self.nframes}, but the video has only {total_frames} frames", "nframes")
            return count
        least = math.ceil(self.min_frames / FRAME_FACTOR) * FRAME_FACTOR
        most = min(self.max_frames, total_frames) // FRAME_FACTOR * FRAME_FACTOR
        wanted = min(max(total_frames / video_fps * self.fps, least), most)
        return max(FRAME_FACTOR, int(wanted // FRAME_FACTOR) * FRAME_FACTOR)

    def frame_indices(self, total_frames: int, n_frames: int) -> list[int]:
        """Which frames are taken: n_frames from the first to the last, evenly spread."""
        return [round(index * (total_frames - 1) / (n_frames - 1)) for index in range(n_frames)]

    def resized(self, height: int, width: int, n_frames: int, factor: int) -> tuple[int, int]:
        """Height and width that every one of n_frames is resized to, as in qwen_vl_utils' `fetch_video`."""
        share = self.total_pixels / n_frames * FRAME_FACTOR
        most = min(self.max_pixels, max(share, int(self.min_pixels * MARGIN)))
        return smart_resize(height, width, factor, self.min_pixels, most)


@dataclass(frozen=True)
class TimedVideoSpec(VideoSpec):
    """The same for Qwen3-VL, as transformers' Qwen3VLVideoProcessor with cap_pixels_per_frame; its defaults.

    Checkpoints limit the area of all frames together: at least least_total_pixels, at most total_pixels. max_pixels,
    of one frame, is 768 tokens, which transformers' cap and qwen-vl-utils have in common.
    """

    min_pixels: int = 0
    max_pixels: int = 768 * 32 * 32
    total_pixels: int = 768 * 32 * 32
    least_total_pixels: int = 128 * 32 * 32

    @classmethod
    def from_hf(cls, settings: Any, file: str = "video_preprocessor_config.json", part: str = "") -> TimedVideoSpec:
        """As `VideoSpec.from_hf`; entries that are missing are as in transformers."""
        entries, default = VideoEntries.read(settings, file, part), cls()
        least, most = entries.pixel_limits
        spec = cls(
            fps=entries.fps or default.fps,
            min_frames=entries.min_frames or default.min_frames,
            max_frames=entries.max_frames or default.max_frames,
            total_pixels=most or default.total_pixels,
            least_total_pixels=least or default.least_total_pixels,
        )
        if spec.min_frames > spec.max_frames or spec.least_total_pixels > spec.total_pixels:
            raise CheckpointError(
                f"{file}: the limits contradict each other: frames from {spec.min_frames} to {spec.max_frames}, pixels "
                f"from {spec.least_total_pixels} to {spec.total_pixels}"
            )
        return spec

    def frame_count(self, total_frames: int, video_fps: float) -> int:
        """How many of a file's frames are taken, also an odd number, by `Qwen3VLVideoProcessor.sample_frames`."""
        if self.nframes is not None:
            return super().frame_count(total_frames, video_fps)
        wanted = max(int(total_frames / video_fps * self.fps), self.min_frames)
        return min(wanted, self.max_frames, total_frames)

    def frame_indices(self, total_frames: int, n_frames: int) -> list[int]:
        """With the step of numpy's linspace, which decides where a frame lies half between two."""
        step = (total_frames - 1) / max(n_frames - 1, 1)
        return [round(index * step) for index in range(n_frames)]

    def resized(self, height: int, width: int, n_frames: int, factor: int) -> tuple[int, int]:
        """Height and width that every frame is resized to, by transformers' `smart_resize` of Qwen3-VL."""
        n_frames = max(n_frames, FRAME_FACTOR)
        least = max(self.least_total_pixels, self.min_pixels * n_frames)
        most = max(min(self.max_pixels, self.total_pixels // n_frames), int(least * MARGIN)) * n_frames
        if min(height, width) < factor:
            grow = max(factor / height, factor / width)
            height, width = int(height * grow), int(width * grow)
        counted = round(n_frames / FRAME_FACTOR) * FRAME_FACTOR
        return smart_resize(height, width, factor, least, most, frames=(n_frames, counted))


def _check_rate(fps: Any, nframes: Any) -> None:
    if fps is not None and nframes is not None:
        raise InputError("send fps or nframes, not both", "nframes")
    if fps is not None and (isinstance(fps, bool) or not isinstance(fps, (int, float)) or not 0 < fps < math.inf):
        raise InputError(f"fps must be a number above 0, got {fps!r}", "fps")
    if nframes is not None and (isinstance(nframes, bool) or not isinstance(nframes, int) or nframes < FRAME_FACTOR):
        raise InputError(f"nframes must be a whole number of at least {FRAME_FACTOR}, got {nframes!r}", "nframes")
