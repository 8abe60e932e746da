"""Reads video files: measures them, and decodes the sampled frames upright, within the policy's limits.

Of a file that is cut off or damaged, the frames that can be decoded are the video, whatever its format; a file without
any is refused.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import dropwhile
from typing import Any

import av
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from PIL import Image

from mdi.core.config import MediaPolicy
from mdi.core.errors import MediaError
from mdi.media.image import on_white
from mdi.media.known import VIDEO, known_as, known_image
from mdi.media.work import Deadline

DEMUXERS = ("mov", "matroska", "avi", "mpegts", "gif")  # FFmpeg's names: mov is MP4 as well, matroska is WebM
DECODERS = (  # FFmpeg's names, of the codecs in use on the web, in phones and in cameras
    *("h264", "hevc", "av1", "libdav1d", "vp8", "vp9", "libvpx", "libvpx-vp9", "gif"),
    *("mpeg4", "mpeg2video", "mpeg1video", "h263", "mjpeg", "prores", "dnxhd", "qtrle", "ffv1", "png", "rawvideo"),
)

FORMATS = "MP4, MOV, WebM, MKV, AVI, MPEG-TS, GIF"
DECODING_BYTES = 24  # for a pixel of a frame: a decoder keeps up to 16 of them, of 12 bits a pixel
USUAL_FPS = 25.0  # for a file with neither rate nor times
RATE_TOLERANCE = 0.05
ANY_NAMES: dict[str, Any] = {"metadata_errors": "replace"} if av.__version__ < "19" else {}  # as PyAV 19 reads them
NO_FRAMES = "the video has no frames, or all of them are damaged"


@dataclass(frozen=True)
class Measures:
    """What a file holds: frames (counted, since headers may be wrong), frames a second, and its upright size."""

    n_frames: int
    fps: float
    height: int
    width: int


@dataclass(frozen=True)
class VideoFile:
    """An encoded video, read twice: to measure it, and to take the frames."""

    data: bytes
    policy: MediaPolicy
    deadline: Deadline

    def measure(self) -> Measures:
        """Reads all packets and decodes up to the first frame."""
        times: list[tuple[int, int]] = []
        n_frames, first = 0, None
        with self._opened() as stream:
            for packet in self._packets(stream):
                if packet and not packet.is_discard:  # discarded ones come before an edit list's start
                    n_frames += 1
                    times += [(packet.pts, packet.duration or 0)] if packet.pts is not None else []
                if n_frames > self.policy.max_video_frames:
                    raise _refusal(f"the video has more than {self.policy.max_video_frames} frames; send a shorter one")
                if first is None:
                    first = next(iter(_decoded(stream, packet)), None)
            if first is None:
                raise _refusal(NO_FRAMES)
            width, height = _upright(first).size
            return Measures(n_frames, _frame_rate(stream, times), height, width)

    def sample(self, total_frames: int, take: Callable[[int], list[int]], height: int, width: int) -> list[Image.Image]:
        """Some frames of a video of total_frames, resized as they are decoded: only these stay in memory.

        take: from the number of all frames to the indices of those that are taken.
        """
        indices = take(total_frames)
        taken = dict.fromkeys(indices)
        count = 0
        with self._opened() as stream:
            for packet in self._packets(stream):
                for frame in _decoded(stream, packet):
                    if count in taken:
                        taken[count] = resize(_upright(frame), height, width)
                    count += 1
        if count == 0:
            raise _refusal(NO_FRAMES)
        if count != total_frames:  # packets and frames are not always one to one: VP8 has hidden frames
            return self.sample(count, take, height, width)
        return [image for image in map(taken.get, indices) if image]

    @contextmanager
    def _opened(self) -> Iterator[VideoStream]:
        limits = {
            "format_whitelist": ",".join(DEMUXERS),  # playlists would make FFmpeg open files and URLs
            "codec_whitelist": ",".join(DECODERS),
            "max_pixels": str(self.policy.max_video_pixels),
        }
        try:
            container = av.open(io.BytesIO(self.data), "r", options=limits, io_open=_open_nothing, **ANY_NAMES)
        except (av.FFmpegError, ValueError):
            raise _refusal(_why_not_opened(self.data)) from None
        with container, self.deadline.work.temporary():
            stream = _pictures(container)
            context = stream.codec_context
            if context.width * context.height > self.policy.max_video_pixels:
                raise _refusal(
                    f"the video is {context.width} x {context.height} pixels, above the limit of "
                    f"{self.policy.max_video_pixels} pixels; send a smaller one"
                )
            self.deadline.work.reserve(context.width * context.height * DECODING_BYTES)
            context.options = {"max_pixels": limits["max_pixels"]}
            context.thread_count = 1  # the other cores are the model's
            yield stream

    def _packets(self, stream: VideoStream) -> Iterator[Packet[VideoStream] | None]:
        """All whole ones from the first key frame on; None is the end, which flushes the decoder."""
        for packet in dropwhile(lambda packet: not packet.is_keyframe, _readable(stream)):
            check_time(self.deadline)
            if packet.size and not packet.is_corrupt:
                yield packet
        yield None


def check_time(deadline: Deadline) -> None:
    """Raises MediaError when the time for a video is over, AbandonedError when its request is cancelled."""
    deadline.work.between_steps()
    if deadline.left_s < 0:
        raise _refusal(f"reading the video took longer than {deadline.limit_s:g} seconds")


def _readable(stream: VideoStream) -> Iterator[Packet[VideoStream]]:
    """The stream's packets, up to where the file cannot be read any more."""
    container = stream.container
    assert isinstance(container, InputContainer)
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
        except av.FFmpegError:
            return
        except IndexError:  # PyAV's, for a packet of a stream that begins in the middle of the file
            packets = container.demux(stream)
            continue
        if packet is None:
            return
        yield packet


def _decoded(stream: VideoStream, packet: Packet[VideoStream] | None) -> list[VideoFrame]:
    """The frames that come out of the decoder next; none of a damaged packet."""
    try:
        return stream.codec_context.decode(packet)
    except av.FFmpegError:
        return []


def _why_not_opened(data: bytes) -> str:
    if data[4:8] == b"ftyp" and b"moov" not in _whole_boxes(data):
        return "the video is cut off: its index, at the end of an MP4 or MOV file, is missing; send the whole file"
    if name := known_image(data):
        return f"this is an image ({name}), not a video: send it as an image"
    if (named := known_as(data)) and named != VIDEO:
        return f"this is {named}"
    return f"this is not a video in a known format ({FORMATS}), or it is damaged"


def _whole_boxes(data: bytes) -> set[bytes]:
    """Types of the top-level boxes of an MP4 or MOV file that are not cut off (ISO/IEC 14496-12, 4.2)."""
    found, position = set[bytes](), 0
    while position + 16 <= len(data):
        size, kind, long_size = struct.unpack_from(">I4sQ", data, position)
        size = {0: len(data) - position, 1: long_size}.get(size, size)
        position += max(size, 8)
        if position <= len(data):
            found.add(kind)
    return found


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
    """Frames a second: the rate that the file states, unless the times of its frames contradict it.

    times: start and duration (0 if unknown) of the frames. Many formats round them, so the stated rate is
    better where it is true; browsers' recordings state 1000.
    """
    stated, measured = float(stream.average_rate or 0), 0.0
    if times and stream.time_base:
        last, duration = max(times)
        span = float((last + duration - min(times)[0]) * stream.time_base)
        measured = (len(times) - (not duration)) / span if span > 0 else 0.0
    if stated > 0 and (not measured or abs(stated / measured - 1) < RATE_TOLERANCE):
        return stated
    return measured or USUAL_FPS


_UPRIGHT = {  # signs of a display matrix (ISO/IEC 14496-12, 6.2.2: x' = ax + cy, y' = bx + dy) -> its transposition
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}


def _upright(frame: VideoFrame) -> Image.Image:
    """A decoded frame as an image: turned as the file states, in RGB, transparency on white."""
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


def resize(image: Image.Image, height: int, width: int) -> Image.Image:
    return image.resize((width, height), Image.Resampling.BICUBIC)
