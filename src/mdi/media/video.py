"""Opens a video, a file or its frames as images: settles how many frames it takes, and decodes them on demand."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from mdi.core.config import MediaPolicy
from mdi.core.errors import MediaError
from mdi.core.messages import MediaSource
from mdi.media.fetch import fetch
from mdi.media.image import decode_image
from mdi.media.patches import Patches, PatchSpec, video_patches
from mdi.media.policy import for_video
from mdi.media.video_file import VideoFile, check_time, resize
from mdi.media.video_spec import FRAME_FACTOR, VideoSpec
from mdi.media.work import Deadline, Work

CUTTING_BYTES = 18  # for a pixel of a frame: RGB twice, and a row's three floats


@dataclass(frozen=True)
class Video:
    """A video with a known number and size of frames, which are decoded on demand.

    height and width are those after resizing. fps: of the frames that are taken. times_s: of each of them, from the
    video's start on.
    """

    n_frames: int
    height: int
    width: int
    fps: float
    times_s: tuple[float, ...]
    spec: PatchSpec
    _work: Work
    _frames: Callable[[], Sequence[Image.Image]]

    @property
    def n_tokens(self) -> int:
        """Tokens it takes in the prompt."""
        return math.ceil(self.n_frames / self.spec.temporal_patch_size) * (
            self.height * self.width // self.spec.factor**2
        )

    def patches(self) -> Patches:
        """Decodes and cuts the frames. Raises MediaError for files that turn out damaged or take too long."""
        self._work.reserve(self.n_frames * self.height * self.width * CUTTING_BYTES)
        frames = self._frames()
        with self._work.computing():
            size = self.spec.temporal_patch_size
            times_s = middle_times(self.times_s, size)
            return replace(video_patches(frames, self.spec), seconds=size / self.fps, times_s=times_s)


def open_video(
    source: MediaSource | Sequence[MediaSource],
    policy: MediaPolicy,
    video: VideoSpec,
    cut: PatchSpec,
    work: Work | None = None,
) -> Video:
    """Fetches and measures a video: a file as `fetch` takes it, or a list of images that are its frames.

    Frames given one by one are all taken, the last one twice where their number is odd. Decodes one frame only.
    Raises MediaError for what cannot be fetched or is no usable video, InputError for `nframes` above its length.
    """
    work = work or Work()
    if isinstance(source, (str, bytes, Path)):
        data = fetch(source, for_video(policy), work)
        return _from_file(VideoFile(data, policy, Deadline.after(policy.video_timeout_s, work)), video, cut)
    return _from_stills(source, policy, video, cut, Deadline.after(policy.video_timeout_s, work))


def middle_times(times_s: Sequence[float], size: int) -> tuple[float, ...]:
    """The middle of each `size` frames, between the first and the last of them; the last frame fills what is missing.

    As in transformers' `Qwen3VLProcessor._calculate_timestamps`.
    """
    filled = [*times_s, *[times_s[-1]] * (-len(times_s) % size)]
    return tuple((filled[start] + filled[start + size - 1]) / 2 for start in range(0, len(filled), size))


# Frames given as images


def _from_stills(
    sources: Sequence[MediaSource], policy: MediaPolicy, video: VideoSpec, cut: PatchSpec, deadline: Deadline
) -> Video:
    video.check_frames(len(sources))
    first = _still(sources, 0, policy, deadline.work)
    n_frames = len(sources) + len(sources) % FRAME_FACTOR
    height, width = video.resized(first.height, first.width, n_frames, cut.factor)

    def frames() -> list[Image.Image]:
        resized = [resize(first, height, width)]
        for index in range(1, len(sources)):
            check_time(deadline)
            with deadline.work.temporary():
                image = _still(sources, index, policy, deadline.work)
                _check_same_size(first, image, index)
                resized.append(resize(image, height, width))
        return resized

    times_s = tuple(index / video.fps for index in range(len(sources)))
    return Video(n_frames, height, width, video.fps, times_s, cut, deadline.work, frames)


def _check_same_size(first: Image.Image, image: Image.Image, index: int) -> None:
    if image.size != first.size:
        raise MediaError(
            f"frame {index} of the video has {image.width} x {image.height} pixels, the first one "
            f"{first.width} x {first.height}: send frames of one size",
            "video",
        )


def _still(sources: Sequence[MediaSource], index: int, policy: MediaPolicy, work: Work) -> Image.Image:
    try:
        data = fetch(sources[index], policy, work)
        with work.computing():
            return decode_image(data, policy, work)
    except MediaError as error:
        raise MediaError(f"frame {index} of the video: {error}", "video") from None


# Files


def _from_file(file: VideoFile, video: VideoSpec, cut: PatchSpec) -> Video:
    with file.deadline.work.computing():
        found = file.measure()
    n_frames = video.frame_count(found.n_frames, found.fps)
    height, width = video.resized(found.height, found.width, n_frames, cut.factor)

    def frames() -> list[Image.Image]:
        with file.deadline.work.computing():
            return file.sample(found.n_frames, take, height, width)

    def take(total_frames: int) -> list[int]:
        return video.frame_indices(total_frames, n_frames)

    fps = n_frames / found.n_frames * found.fps
    times_s = tuple(index / found.fps for index in take(found.n_frames))
    return Video(n_frames, height, width, fps, times_s, cut, file.deadline.work, frames)
