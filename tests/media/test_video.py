"""Every kind of video in, the right frames or the right refusal out."""

from __future__ import annotations

import contextlib
import io
import random
import struct
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from testing.videos import LOSSLESS, colour, encoded, numbered, sound

from mdi.core.errors import MediaError
from mdi.media import MediaPolicy, PatchSpec, VideoSpec, image_patches, open_video, video_patches

POLICY = MediaPolicy()

CUT = PatchSpec()

SMALL = VideoSpec(min_pixels=28 * 28, max_pixels=64 * 48)


def frames_of(data: bytes, spec: VideoSpec = SMALL, policy: MediaPolicy = POLICY) -> list[np.ndarray]:
    """The frames that are taken, as the vision tower's rows show them: uint8 [height, width, 3]."""
    patches = open_video(data, policy, spec, CUT).patches()
    n_frames, height, width = patches.grid[0] * 2, patches.grid[1] * 14, patches.grid[2] * 14
    rows = patches.rows.reshape(n_frames // 2, height // 28, width // 28, 2, 2, 3, 2, 14, 14)
    values = rows.transpose(0, 6, 1, 3, 7, 2, 4, 8, 5).reshape(n_frames, height, width, 3)
    pixels = (values * np.array(CUT.image_std) + np.array(CUT.image_mean)) * 255
    return list(np.rint(pixels).astype(int))


def colours(frames: Sequence[np.ndarray]) -> list[tuple[int, ...]]:
    """Each frame's colour, in its middle."""
    return [tuple(frame[frame.shape[0] // 2, frame.shape[1] // 2].tolist()) for frame in frames]


def refusal(data: bytes, policy: MediaPolicy = POLICY, spec: VideoSpec = SMALL) -> str:
    with pytest.raises(MediaError) as caught:
        open_video(data, policy, spec, CUT).patches()
    assert caught.value.field == "video"
    return str(caught.value)


# Files


def test_the_very_pixels_of_the_right_frames_are_taken() -> None:
    frames = frames_of(encoded(numbered(61), *LOSSLESS, fps=10))
    assert colours(frames) == [colour(index) for index in (0, 5, 11, 16, 22, 27, 33, 38, 44, 49, 55, 60)]
    assert all((frame == frame[0, 0]).all() for frame in frames)


@pytest.mark.parametrize(
    ("container", "codec", "pixels"),
    [
        ("mp4", "libx264", "yuv420p"),
        ("mov", "libx264", "yuv420p"),
        ("mp4", "libx265", "yuv420p"),
        ("mp4", "mpeg4", "yuv420p"),
        ("webm", "libvpx-vp9", "yuv420p"),
        ("webm", "libvpx", "yuv420p"),
        ("matroska", "libx264", "yuv420p10le"),
        ("matroska", "ffv1", "bgr0"),
        ("mov", "prores", "yuva444p10le"),
        ("avi", "mjpeg", "yuvj420p"),
        ("mpegts", "libx264", "yuv420p"),
        ("mpegts", "mpeg2video", "yuv420p"),
        ("gif", "gif", "bgr8"),
    ],
)
def test_every_usual_format_shows_its_frames(container: str, codec: str, pixels: str) -> None:
    if codec not in av.codecs_available:
        pytest.skip(f"this FFmpeg has no {codec}")
    shades = [Image.new("RGB", (64, 48), (level, 255 - level, 128)) for level in range(0, 250, 10)]
    quality = {"crf": "10"} if codec.startswith("libx") else {"qmin": "1", "qmax": "2"} if "peg" in codec else {}
    frames = frames_of(encoded(shades, container, codec, pixels, options=quality), SMALL.with_options(nframes=6))
    expected = [(level, 255 - level, 128) for level in (0, 50, 100, 140, 190, 240)]
    tolerance = 50 if container == "gif" else 12  # GIF's palette here has 8 shades
    assert np.abs(np.array(colours(frames)) - expected).max() <= tolerance


def test_frames_between_uneven_times_are_counted_by_the_clock() -> None:
    times = [0, 0.1, 0.2, 0.3, 0.4, 1, 2, 3, 9, 12]
    video = open_video(encoded(numbered(10), times=times), POLICY, SMALL.with_options(fps=0.5), CUT)
    assert video.n_frames == 6  # of 12 seconds, though the file claims 10 frames a second
    assert open_video(encoded(numbered(10)), POLICY, SMALL.with_options(fps=0.5), CUT).n_frames == 4


def test_a_header_that_lies_about_the_number_of_frames_is_not_believed() -> None:
    data = encoded(numbered(40), "avi", "mjpeg", "yuvj420p")
    truth = colours(frames_of(data))
    assert len(truth) == 8
    for claim in (1, 3, 10**6):
        lie = bytearray(data)
        main, stream = data.index(b"avih") + 8, data.index(b"strh") + 8
        struct.pack_into("<I", lie, main + 16, claim)
        struct.pack_into("<I", lie, stream + 32, claim)
        assert colours(frames_of(bytes(lie))) == truth


def test_frames_that_a_file_hides_are_not_counted() -> None:
    data = encoded(numbered(40), "webm", "libvpx", options={"g": "1"})
    with av.open(io.BytesIO(data), "r") as file:
        packets = [bytes(packet) for packet in file.demux(video=0) if packet.size]
    for packet in packets[20:]:
        data = data.replace(packet, bytes([packet[0] & ~0x10]) + packet[1:])  # RFC 6386, 9.1: show_frame
    with av.open(io.BytesIO(data), "r") as file:
        assert sum(1 for _ in file.decode(video=0)) == 20
    shown = np.array(colours(frames_of(data, SMALL.with_options(nframes=4))))
    assert np.abs(shown - [colour(index) for index in (0, 6, 13, 19)]).max() < 24


TURNS = {  # the matrix's a, b, c, d -> where the corner that was top left is shown: (bottom?, right?)
    (1, 0, 0, 1): (0, 0),
    (0, 1, -1, 0): (0, 1),
    (-1, 0, 0, -1): (1, 1),
    (0, -1, 1, 0): (1, 0),
    (-1, 0, 0, 1): (0, 1),
    (1, 0, 0, -1): (1, 0),
    (0, 1, 1, 0): (0, 0),
    (0, -1, -1, 0): (1, 1),
}


@pytest.mark.parametrize("turn", TURNS)
def test_a_film_from_a_turned_phone_is_shown_upright(turn: tuple[int, int, int, int]) -> None:
    image = Image.new("RGB", (64, 48), "black")
    image.paste("red", (0, 0, 32, 24))
    data = encoded([image] * 4, options={"crf": "5"})
    start = data.index(b"tkhd") + 4 + 40  # ISO/IEC 14496-12, 8.3.2: the matrix of the track header
    a, b, c, d = (value << 16 for value in turn)
    data = data[:start] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + data[start + 36 :]
    frame = frames_of(data, SMALL.with_options(min_pixels=40_000))[0]
    height, width, _ = frame.shape
    assert (width > height) == (turn[0] != 0)
    corners = frame[[5, -5]][:, [5, -5], 0]
    bottom, right = TURNS[turn]
    assert corners[bottom, right] > 200
    assert np.sort(corners.flatten())[2] < 50


def test_transparency_is_shown_on_white() -> None:
    faint = Image.new("RGBA", (64, 48), (200, 0, 0, 51))  # a fifth of the red
    assert colours(frames_of(encoded([faint] * 4, "mov", "qtrle", "argb"))) == [(244, 204, 204)] * 4


def test_a_video_of_one_frame_is_that_frame_twice() -> None:
    assert colours(frames_of(encoded(numbered(1), *LOSSLESS))) == [colour(0)] * 2


def test_a_film_is_read_from_its_first_key_frame_on() -> None:
    options = {"g": "10", "bf": "0", "sc_threshold": "1000000000"}
    data = encoded(numbered(40), "mpegts", "mpeg2video", options=options)
    with av.open(io.BytesIO(data), "r") as file:
        first, second, *_ = [packet.pos for packet in file.demux(video=0) if packet.is_keyframe and packet.pos]
    cut = data[: first // 188 * 188] + data[(first + second) // 2 // 188 * 188 :]
    shown = np.array(colours(frames_of(cut, SMALL.with_options(nframes=2))))
    assert np.abs(shown - [colour(10), colour(39)]).max() < 24


@pytest.mark.parametrize("kind", ["path", "text", "url"])
def test_a_video_comes_from_wherever_an_image_comes_from(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(encoded(numbered(10)))
    sources: dict[str, str | Path] = {"path": path, "text": str(path), "url": path.as_uri()}
    source = sources[kind]
    assert open_video(source, MediaPolicy(media_dir=tmp_path), SMALL, CUT).n_frames == 4


def test_the_tokens_are_known_before_anything_is_decoded() -> None:
    video = open_video(encoded(numbered(100, (320, 240))), POLICY, VideoSpec(), CUT)
    patches = video.patches()
    assert video.n_tokens == patches.n_tokens == 20 // 2 * 10 * 14
    assert patches.grid == (10, 20, 28)
    assert patches.rows.shape == (10 * 20 * 28, 1176)


# Frames given as images


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_images_are_all_taken_as_frames_the_last_twice_if_they_are_odd() -> None:
    images = [png(image) for image in numbered(5)]
    patches = open_video(images, POLICY, SMALL, CUT).patches()
    even = open_video([*images, images[-1]], POLICY, SMALL, CUT).patches()
    assert patches.grid == (3, 2, 4)
    np.testing.assert_array_equal(patches.rows, even.rows)
    assert patches.digest == even.digest != open_video(images[:4], POLICY, SMALL, CUT).patches().digest


def test_a_still_twice_is_the_still() -> None:
    still = numbered(8)[7].resize((84, 56))
    twice, image = video_patches([still, still], CUT), image_patches(still, replace(CUT, min_pixels=784))
    assert twice.grid == image.grid
    np.testing.assert_array_equal(twice.rows, image.rows)


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([], "1 to 768 frames"),
        ([png(image) for image in numbered(1)] * 769, "has 769"),
        ([png(numbered(1)[0]), b"no image"], "frame 1 of the video: this is not an image"),
        ([png(Image.new("RGB", size)) for size in ((40, 30), (30, 40))], "frame 1 .* 30 x 40 .* first one 40 x 30"),
        ([b""], "frame 0 .* empty"),
    ],
    ids=["none", "too many", "no image", "two sizes", "empty"],
)
def test_bad_frames_are_refused_with_their_number(sources: list[bytes], message: str) -> None:
    with pytest.raises(MediaError, match=message) as caught:
        open_video(sources, POLICY, SMALL, CUT).patches()
    assert caught.value.field == "video"


# What is no video, and what is too much


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"no video at all " * 50, "known format"),
        (png(Image.new("RGB", (30, 30))), "an image (PNG), not a video: send it as an image"),
        (sound(), "no video"),
        (sound("matroska"), "no video"),
        (encoded(numbered(9), "flv", "flv1"), "known format"),
        (encoded(numbered(9), "avi", "wmv2"), "codec"),
        (encoded(numbered(9))[:600], "cut off: its index"),
        (encoded(numbered(40))[:-200], "cut off: its index"),
    ],
    ids=["text", "image", "sound", "more sound", "format", "codec", "cut MP4", "cut end"],
)
def test_what_is_no_video_is_refused(data: bytes, message: str) -> None:
    assert message in refusal(data)


INTRA = {"g": "5", "bf": "0"}
WITHOUT_INDEX_AT_THE_END = {
    "mp4": ("libx264", "yuv420p", INTRA),
    "mov": ("qtrle", "rgb24", {}),
    "matroska": ("libx264", "yuv420p", INTRA),
    "webm": ("libvpx", "yuv420p", {}),
    "mpegts": ("mpeg2video", "yuv420p", INTRA),
    "avi": ("mjpeg", "yuvj420p", {}),
    "gif": ("gif", "bgr8", {}),
}


def noisy_film(container: str) -> bytes:
    """40 frames of about the same length in bytes; the index of MP4 and MOV stands in front."""
    codec, pixels, options = WITHOUT_INDEX_AT_THE_END[container]
    noise = np.random.default_rng(0).integers(0, 256, (40, 48, 64, 3), dtype=np.uint8)
    data = encoded([Image.fromarray(frame) for frame in noise], container, codec, pixels, options=options)
    return with_index_in_front(data) if container in ("mp4", "mov") else data


@pytest.mark.parametrize("container", WITHOUT_INDEX_AT_THE_END)
def test_of_a_film_that_is_cut_off_the_frames_that_are_there_are_taken(container: str) -> None:
    """C10: the same rule for every format."""
    data = noisy_film(container)
    assert open_video(data, POLICY, SMALL.with_options(fps=10), CUT).n_frames == 40
    for kept in (0.7, 0.4):
        video = open_video(data[: int(len(data) * kept)], POLICY, SMALL.with_options(fps=10), CUT)
        assert 40 * (kept - 0.25) < video.n_frames < 40 * (kept + 0.2)
        assert video.patches().n_tokens == video.n_tokens


@pytest.mark.parametrize("container", WITHOUT_INDEX_AT_THE_END)
def test_of_a_film_that_is_damaged_in_the_middle_the_rest_is_taken(container: str) -> None:
    """C10: what comes before the damage, and what comes after it where the format allows to find it."""
    data = noisy_film(container)
    middle = len(data) // 2
    damaged = data[:middle] + bytes(range(256)) * 8 + data[middle + 2048 :]
    assert 8 <= open_video(damaged, POLICY, SMALL.with_options(fps=10), CUT).n_frames <= 42
    assert open_video(damaged, POLICY, SMALL.with_options(fps=10), CUT).patches().n_tokens


def with_index_in_front(data: bytes) -> bytes:
    """An MP4 or MOV file with its `moov` box before `mdat`, as for the web."""
    with TemporaryDirectory() as folder:
        path = str(Path(folder) / "film.mp4")
        with (
            av.open(io.BytesIO(data), "r") as source,
            av.open(path, "w", format="mov", options={"movflags": "faststart"}) as file,
        ):
            stream = file.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.dts is not None:
                    packet.stream = stream
                    file.mux(packet)
        return Path(path).read_bytes()


@pytest.mark.parametrize("kind", ["hls", "concat", "dash", "sdp"])
def test_a_playlist_opens_no_file(kind: str, tmp_path: Path) -> None:
    (tmp_path / "secret.mp4").write_bytes(encoded(numbered(10)))
    secret = (tmp_path / "secret.mp4").as_posix()
    playlists = {
        "hls": f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{secret}\n#EXT-X-ENDLIST\n",
        "concat": f"ffconcat version 1.0\nfile '{secret}'\n",
        "dash": f'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><BaseURL>{secret}</BaseURL></MPD>',
        "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\n",
    }
    assert "known format" in refusal(playlists[kind].encode())


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ({"max_video_bytes": 1000}, "larger than the limit"),
        ({"max_video_pixels": 64 * 48 - 1}, "64 x 48 pixels, above the limit of 3071"),
        ({"max_video_frames": 39}, "more than 39 frames; send a shorter one"),
        ({"video_timeout_s": 1e-9}, "took longer than 1e-09 seconds"),
    ],
)
def test_the_policy_limits_a_video(limit: dict[str, Any], message: str) -> None:
    data = encoded(numbered(40))
    with pytest.raises(MediaError, match=message):
        open_video(data, replace(POLICY, **limit), SMALL, CUT).patches()
    enough = replace(POLICY, max_video_bytes=len(data), max_video_pixels=64 * 48, max_video_frames=40)
    assert len(frames_of(data, policy=enough)) == 8


def test_a_header_that_lies_about_the_size_gains_nothing() -> None:
    data = bytearray(encoded([Image.new("RGB", (640, 480))] * 4, "avi", "mjpeg", "yuvj420p"))
    for field in (data.index(b"avih") + 8 + 32, data.index(b"strf") + 8 + 4):
        struct.pack_into("<II", data, field, 64, 48)
    assert "damaged" in refusal(bytes(data), replace(POLICY, max_video_pixels=64 * 48))


def test_names_in_no_known_writing_do_no_harm() -> None:
    buffer = io.BytesIO()
    with av.open(io.BytesIO(encoded(numbered(10))), "r") as source, av.open(buffer, "w", format="mp4") as file:
        file.metadata["title"] = "TITLE"
        stream = file.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                file.mux(packet)
    data = buffer.getvalue()
    assert b"TITLE" in data
    assert len(frames_of(data.replace(b"TITLE", b"\xff\xfe\xfd\xfc\xfb"))) == 4


@pytest.mark.parametrize("container", ["mp4", "webm", "avi", "mpegts", "gif"])
def test_damaged_bytes_give_frames_or_a_refusal_and_nothing_else(container: str) -> None:
    codec, pixels = {"webm": ("libvpx", "yuv420p"), "gif": ("gif", "bgr8")}.get(container, ("mpeg4", "yuv420p"))
    data = encoded(numbered(20), container, codec, pixels)
    generator = random.Random(0)
    for _ in range(60):
        damaged = bytearray(data)
        for _ in range(generator.randint(1, 20)):
            damaged[generator.randrange(len(data))] = generator.randrange(256)
        with contextlib.suppress(MediaError):
            patches = open_video(bytes(damaged), POLICY, SMALL, CUT).patches()
            assert len(patches.rows) == patches.n_tokens * 4
