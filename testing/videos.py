"""Video files made of given frames, and a file with sound only."""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np
from av.audio.stream import AudioStream
from av.video.stream import VideoStream
from PIL import Image

LOSSLESS = ("mov", "qtrle", "rgb24")


def colour(index: int) -> tuple[int, int, int]:
    """The colour of a frame. The first 8,000 differ."""
    return index % 20 * 12, index // 20 % 20 * 12, index // 400 * 12


def numbered(n_frames: int, size: tuple[int, int] = (64, 48)) -> list[Image.Image]:
    """Frames of one colour each, which tells their number."""
    return [Image.new("RGB", size, colour(index)) for index in range(n_frames)]


def encoded(
    frames: Sequence[Image.Image],
    container: str = "mp4",
    codec: str = "libx264",
    pixels: str = "yuv420p",
    *,
    fps: int = 10,
    times: Sequence[float] | None = None,
    options: dict[str, str] | None = None,
) -> bytes:
    """A video file. times: seconds of the frames, if they are not equally spaced. options: for the encoder."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as file:
        stream = file.add_stream(codec, rate=fps, options=options)
        assert isinstance(stream, VideoStream)
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = pixels
        tick = Fraction(1, 1000) if times else Fraction(1, fps)
        stream.codec_context.time_base = tick
        for index, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.asarray(image), format="rgba" if image.mode == "RGBA" else "rgb24")
            frame.pts, frame.time_base = round(times[index] / tick) if times else index, tick
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return buffer.getvalue()


def endless(n_frames: int) -> bytes:
    """An MPEG-4 film in AVI of that many frames, 16 x 16 pixels, all the same: made in no time, however long."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="avi") as file:
        stream = file.add_stream("mpeg4", rate=25)
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv420p"
        picture = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")
        content = bytes([*stream.encode(picture), *stream.encode()][0])
        for index in range(n_frames):
            packet = av.Packet(content)
            packet.stream, packet.time_base, packet.is_keyframe = stream, Fraction(1, 25), True
            packet.pts = packet.dts = index
            file.mux(packet)
    return buffer.getvalue()


def sound(container: str = "mp4", codec: str = "aac") -> bytes:
    """A file with a second of silence and no picture."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as file:
        stream = file.add_stream(codec, rate=8000)
        assert isinstance(stream, AudioStream)
        frame = av.AudioFrame(format="fltp", layout="mono", samples=8000)
        frame.sample_rate = 8000
        for plane in frame.planes:
            plane.update(bytes(plane.buffer_size))
        file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return buffer.getvalue()
