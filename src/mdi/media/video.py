"""From an encoded video, or its frames as images, to the rows of pixels that Qwen2-VL's vision tower reads.

Frames are sampled and sized as qwen-vl-utils does it. Knows nothing about prompts, models or torch.
"""

from __future__ import annotations

import io
import math
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import dropwhile
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from PIL import Image

from mdi.core.errors import CheckpointError, InputError, MediaError
from mdi.media.fetch import fetch
from mdi.media.image import (
    Patches,
    PatchSpec,
    check_pixels,
    decode_image,
    digest_of,
    first_limit,
    merge_order,
    normalized_bytes,
    on_white,
    smart_resize,
)
from mdi.media.policy import MediaPolicy

DEMUXERS = ("mov", "matroska", "avi", "mpegts", "gif")  # FFmpeg's names: mov is MP4 as well, matroska is WebM
DECODERS = (  # FFmpeg's names, of the codecs in use on the web, in phones and in cameras
    *("h264", "hevc", "av1", "libdav1d", "vp8", "vp9", "libvpx", "libvpx-vp9", "gif"),
    *("mpeg4", "mpeg2video", "mpeg1video", "h263", "mjpeg", "prores", "dnxhd", "qtrle", "ffv1", "png", "rawvideo"),
)
FRAME_FACTOR = 2  # the sampled frames are a multiple of it
USUAL_FPS = 25.0  # for a file that tells neither rate nor times
TOKEN_PIXELS = 28 * 28
MARGIN = 1.05  # the largest area of a frame is at least so many times the smallest

RATE_TOLERANCE = 0.05
FORMATS = "MP4, MOV, WebM, MKV, AVI, MPEG-TS, GIF"
DAMAGED = "the video is damaged or cut off"
NO_FRAMES = "the video has no frames"

Source = str | bytes | Path


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
    def from_hf(cls, video_preprocessor_config: Mapping[str, Any]) -> VideoSpec:
        """Reads video_preprocessor_config.json; what it does not say is as in qwen-vl-utils.

        Raises CheckpointError when its numbers make no sense.
        """
        config, default = video_preprocessor_config, cls()
        try:
            size = config.get("size") or {}
            spec = cls(
                fps=float(config.get("fps") or default.fps),
                min_frames=int(config.get("min_frames") or default.min_frames),
                max_frames=int(config.get("max_frames") or default.max_frames),
                min_pixels=first_limit(config, size, "min_pixels", "shortest_edge", default.min_pixels),
                max_pixels=first_limit(config, size, "max_pixels", "longest_edge", default.max_pixels),
            )
        except (TypeError, ValueError, AttributeError):
            raise CheckpointError("video_preprocessor_config.json holds values that are not numbers") from None
        frames_fit = FRAME_FACTOR <= spec.min_frames <= spec.max_frames
        if not (frames_fit and 0 < spec.min_pixels <= spec.max_pixels and 0 < spec.fps < math.inf):
            raise CheckpointError("video_preprocessor_config.json has limits that contradict each other")
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
        """The same with a request's own wishes; None keeps what is there. max_pixels can only lower the limit.

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

    def frame_count(self, total_frames: int, video_fps: float) -> int:
        """How many of a file's frames are taken: qwen_vl_utils' `smart_nframes`; of a single one, two copies.

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

    def resized(self, height: int, width: int, n_frames: int, factor: int) -> tuple[int, int]:
        """Height and width that every one of n_frames is resized to, as in qwen_vl_utils' `fetch_video`."""
        share = self.total_pixels / n_frames * FRAME_FACTOR
        most = min(self.max_pixels, max(share, int(self.min_pixels * MARGIN)))
        return smart_resize(height, width, factor, self.min_pixels, most)


def _check_rate(fps: Any, nframes: Any) -> None:
    if fps is not None and nframes is not None:
        raise InputError("send fps or nframes, not both", "nframes")
    if fps is not None and (isinstance(fps, bool) or not isinstance(fps, (int, float)) or not 0 < fps < math.inf):
        raise InputError(f"fps must be a number above 0, got {fps!r}", "fps")
    if nframes is not None and (isinstance(nframes, bool) or not isinstance(nframes, int) or nframes < FRAME_FACTOR):
        raise InputError(f"nframes must be a whole number of at least {FRAME_FACTOR}, got {nframes!r}", "nframes")


def frame_indices(total_frames: int, n_frames: int) -> list[int]:
    """Which frames are taken: n_frames from the first to the last, evenly spread."""
    return [round(index * (total_frames - 1) / (n_frames - 1)) for index in range(n_frames)]


@dataclass(frozen=True)
class Video:
    """A video of which it is settled how many frames are taken and in what size; they are decoded on demand.

    n_frames is even; height and width are those after resizing.
    """

    n_frames: int
    height: int
    width: int
    spec: PatchSpec
    _frames: Callable[[], Sequence[Image.Image]]

    @property
    def n_tokens(self) -> int:
        """Tokens it takes in the prompt."""
        return math.ceil(self.n_frames / self.spec.temporal_patch_size) * (
            self.height * self.width // self.spec.factor**2
        )

    def patches(self) -> Patches:
        """Decodes and cuts the frames. Raises MediaError for files that turn out damaged or take too long."""
        return video_patches(self._frames(), self.spec)


def open_video(source: Source | Sequence[Source], policy: MediaPolicy, video: VideoSpec, cut: PatchSpec) -> Video:
    """Fetches and measures a video: a file as `fetch` takes it, or a list of images that are its frames.

    Frames given one by one are all taken, the last one twice where their number is odd. Decodes one frame only.
    Raises MediaError for what cannot be fetched or is no usable video, InputError for `nframes` above its length.
    """
    if isinstance(source, (str, bytes, Path)):
        return _from_file(fetch(source, policy.for_video()), policy, video, cut)
    return _from_stills(source, policy, video, cut)


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


# Frames given as images


def _from_stills(sources: Sequence[Source], policy: MediaPolicy, video: VideoSpec, cut: PatchSpec) -> Video:
    if not 0 < len(sources) <= video.max_frames:
        raise MediaError(f"a video may have 1 to {video.max_frames} frames, and this one has {len(sources)}", "video")
    deadline = time.monotonic() + policy.video_timeout_s
    first = _still(sources, 0, policy)
    n_frames = len(sources) + len(sources) % FRAME_FACTOR
    height, width = video.resized(first.height, first.width, n_frames, cut.factor)

    def frames() -> list[Image.Image]:
        resized = [_resized(first, height, width)]
        for index in range(1, len(sources)):
            _check_time(deadline, policy)
            image = _still(sources, index, policy)
            if image.size != first.size:
                raise MediaError(
                    f"frame {index} of the video has {image.width} x {image.height} pixels, the first one "
                    f"{first.width} x {first.height}: send frames of one size",
                    "video",
                )
            resized.append(_resized(image, height, width))
        return resized

    return Video(n_frames, height, width, cut, frames)


def _still(sources: Sequence[Source], index: int, policy: MediaPolicy) -> Image.Image:
    try:
        return decode_image(fetch(sources[index], policy), policy)
    except MediaError as error:
        raise MediaError(f"frame {index} of the video: {error}", "video") from None


def _resized(image: Image.Image, height: int, width: int) -> Image.Image:
    return image.resize((width, height), Image.Resampling.BICUBIC)


# Files


def _from_file(data: bytes, policy: MediaPolicy, video: VideoSpec, cut: PatchSpec) -> Video:
    file = _File(data, policy, time.monotonic() + policy.video_timeout_s)
    found = file.measure()
    n_frames = video.frame_count(found.n_frames, found.fps)
    height, width = video.resized(found.height, found.width, n_frames, cut.factor)

    def frames() -> list[Image.Image]:
        return file.sample(found.n_frames, n_frames, height, width)

    return Video(n_frames, height, width, cut, frames)


@dataclass(frozen=True)
class _Measures:
    """What a file holds, counted and not believed: frames, frames a second, and the size of the first, upright."""

    n_frames: int
    fps: float
    height: int
    width: int


@dataclass(frozen=True)
class _File:
    """An encoded video, read twice: to measure it, and to take the frames. deadline: on the monotonic clock."""

    data: bytes
    policy: MediaPolicy
    deadline: float

    def measure(self) -> _Measures:
        """Reads all packets and decodes up to the first frame."""
        times: list[tuple[int, int]] = []
        n_frames, first = 0, None
        with self._opened() as stream:
            for packet in self._packets(stream):
                if packet.size and not packet.is_discard:  # discarded ones come before an edit list's start
                    n_frames += 1
                    times += [(packet.pts, packet.duration or 0)] if packet.pts is not None else []
                if n_frames > self.policy.max_video_frames:
                    raise _refusal(f"the video has more than {self.policy.max_video_frames} frames; send a shorter one")
                if first is None:
                    first = next(iter(packet.decode()), None)
            if first is None:
                raise _refusal(NO_FRAMES)
            width, height = _upright(first).size
            return _Measures(n_frames, _frame_rate(stream, times), height, width)

    def sample(self, total_frames: int, n_frames: int, height: int, width: int) -> list[Image.Image]:
        """n_frames of a video of total_frames, resized as they come: only these stay in memory."""
        indices = frame_indices(total_frames, n_frames)
        taken = dict.fromkeys(indices)
        count = 0
        with self._opened() as stream:
            for packet in self._packets(stream):
                for frame in packet.decode():
                    if count in taken:
                        taken[count] = _resized(_upright(frame), height, width)
                    count += 1
        if count == 0:
            raise _refusal(NO_FRAMES)
        if count != total_frames:  # packets and frames are not always one to one: VP8 has hidden frames
            return self.sample(count, n_frames, height, width)
        return [image for image in map(taken.get, indices) if image]

    @contextmanager
    def _opened(self) -> Iterator[VideoStream]:
        limits = {
            "format_whitelist": ",".join(DEMUXERS),  # playlists would make FFmpeg open files and URLs
            "codec_whitelist": ",".join(DECODERS),
            "max_pixels": str(self.policy.max_video_pixels),
        }
        try:
            container = av.open(
                io.BytesIO(self.data), "r", options=limits, metadata_errors="replace", io_open=_open_nothing
            )
        except (av.FFmpegError, ValueError):
            raise _refusal(f"this is not a video in a known format ({FORMATS}), or it is damaged") from None
        with container:
            stream = _pictures(container)
            context = stream.codec_context
            if context.width * context.height > self.policy.max_video_pixels:
                raise _refusal(
                    f"the video is {context.width} x {context.height} pixels, above the limit of "
                    f"{self.policy.max_video_pixels} pixels; send a smaller one"
                )
            context.options = {"max_pixels": limits["max_pixels"]}
            context.thread_count = 1  # the other cores are the model's
            try:
                yield stream
            except av.FFmpegError:
                raise _refusal(DAMAGED) from None

    def _packets(self, stream: VideoStream) -> Iterator[Packet[VideoStream]]:
        """All from the first key frame on, and an empty one that flushes the decoder."""
        container = stream.container
        assert isinstance(container, InputContainer)
        for packet in dropwhile(lambda packet: not packet.is_keyframe, container.demux(stream)):
            _check_time(self.deadline, self.policy)
            if packet.is_corrupt:
                raise _refusal(DAMAGED)
            yield packet


def _check_time(deadline: float, policy: MediaPolicy) -> None:
    if time.monotonic() > deadline:
        raise _refusal(f"reading the video took longer than {policy.video_timeout_s:g} seconds")


def _refusal(message: str) -> MediaError:
    return MediaError(message, "video")


def _open_nothing(*_: Any) -> None:
    raise PermissionError("a video may not refer to other files")


def _pictures(container: InputContainer) -> VideoStream:
    """The first stream of moving pictures: not the cover of a piece of music."""
    streams = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if not streams:
        raise _refusal("the file holds no video")
    if streams[0].codec_context is None or streams[0].codec_context.codec.name not in DECODERS:
        raise _refusal("the video's codec is not known here: convert it to H.264, VP9 or AV1")
    return streams[0]


def _frame_rate(stream: VideoStream, times: Sequence[tuple[int, int]]) -> float:
    """Frames a second, from the file's own word, unless the frames' times contradict it.

    times: start and duration (0 if unknown) of the frames. They are rounded in many formats, so the word is better
    where it is true; browsers' recordings claim 1000.
    """
    told, measured = float(stream.average_rate or 0), 0.0
    if times and stream.time_base:
        last, duration = max(times)
        span = float((last + duration - min(times)[0]) * stream.time_base)
        measured = (len(times) - (not duration)) / span if span > 0 else 0.0
    if told > 0 and (not measured or abs(told / measured - 1) < RATE_TOLERANCE):
        return told
    return measured or USUAL_FPS


_UPRIGHT = {  # signs of a display matrix (ISO/IEC 14496-12, 6.2.2: x' = ax + cy, y' = bx + dy) -> what it does
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}


def _upright(frame: VideoFrame) -> Image.Image:
    """A decoded frame as it is to be shown: turned as the file says, in RGB, transparency on white."""
    if any(component.is_alpha for component in frame.format.components):
        image = on_white(Image.fromarray(frame.to_ndarray(format="rgba")))
    else:
        image = Image.fromarray(frame.to_ndarray(format="rgb24"))
    matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return image
    a, b, _, c, d, *_ = struct.unpack("<9i", bytes(matrix))
    turn = _UPRIGHT.get(tuple((value > 0) - (value < 0) for value in (a, b, c, d)))
    return image if turn is None else image.transpose(turn)
