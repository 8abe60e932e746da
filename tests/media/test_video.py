"""Every kind of video in, the right frames in the right size or the right refusal out."""

from __future__ import annotations

import contextlib
import io
import random
import struct
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from testing.videos import LOSSLESS, colour, encoded, numbered, sound

from mdi.core.errors import CheckpointError, InputError, MediaError
from mdi.media import MediaPolicy, PatchSpec, VideoSpec, image_patches, open_video, video_patches
from mdi.media.video import frame_indices

POLICY = MediaPolicy()
CUT = PatchSpec()
SPEC = VideoSpec()
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


# How many frames, which, how large


@pytest.mark.parametrize(
    ("total_frames", "video_fps", "options", "taken"),
    [
        (100, 25, {}, 8),  # 4 seconds, 2 frames of each
        (250, 25, {}, 20),
        (330, 30, {"fps": 1}, 10),  # 11, made even
        (30, 30, {}, 4),  # not below min_frames
        (90, 30, {"fps": 1}, 4),
        (3, 30, {}, 2),  # not above what there is
        (2, 30, {}, 2),
        (1, 30, {}, 2),  # twice the same
        (50, 25, {"fps": 100}, 50),
        (51, 25, {"fps": 100}, 50),
        (100_000, 25, {}, 768),  # not above max_frames
        (100, 25, {"nframes": 12}, 12),
        (100, 25, {"nframes": 5}, 4),  # to the nearest even number, half to the even half
        (100, 25, {"nframes": 7}, 8),
        (12, 25, {"nframes": 12}, 12),
    ],
)
def test_as_many_frames_are_taken_as_qwen_vl_utils_takes(
    total_frames: int, video_fps: float, options: dict[str, Any], taken: int
) -> None:
    assert SPEC.with_options(**options).frame_count(total_frames, video_fps) == taken


def test_more_frames_than_there_are_cannot_be_asked_for() -> None:
    with pytest.raises(InputError, match="only 12 frames") as caught:
        SPEC.with_options(nframes=14).frame_count(12, 25)
    assert caught.value.field == "nframes"


@pytest.mark.parametrize(
    ("total_frames", "n_frames", "indices"),
    [
        (10, 4, [0, 3, 6, 9]),
        (6, 4, [0, 2, 3, 5]),
        (100, 2, [0, 99]),
        (4, 4, [0, 1, 2, 3]),
        (1, 2, [0, 0]),
        (3, 4, [0, 1, 1, 2]),
    ],
)
def test_frames_are_spread_from_the_first_to_the_last(total_frames: int, n_frames: int, indices: list[int]) -> None:
    assert frame_indices(total_frames, n_frames) == indices


@pytest.mark.parametrize(
    ("size", "n_frames", "options", "resized"),
    [
        ((360, 640), 8, {}, (364, 644)),  # within the limits: to the nearest multiple of 28
        ((1080, 1920), 8, {}, (560, 1008)),  # at most 768 tokens, 602,112 pixels
        ((48, 64), 8, {}, (280, 392)),  # at least 128 tokens, 100,352 pixels
        ((1080, 1920), 768, {}, (224, 420)),  # 24,576 tokens for all are 64 a frame: 1.05 times the least
        ((1080, 1920), 128, {}, (392, 728)),  # 384 tokens a frame, 301,056 pixels
        ((1080, 1920), 8, {"max_pixels": 50_000}, (140, 280)),  # a limit below the least lowers it
        ((1080, 1920), 8, {"max_pixels": 5_000_000}, (560, 1008)),  # a limit above the most does not raise it
        ((1080, 1920), 8, {"total_pixels": 4 * 200_000}, (308, 588)),  # 200,000 pixels for each
        ((48, 64), 8, {"min_pixels": 200_000}, (392, 532)),
        ((48, 64), 8, {"min_pixels": 700_000}, (728, 980)),
    ],
)
def test_frames_are_resized_as_qwen_vl_utils_does_it(
    size: tuple[int, int], n_frames: int, options: dict[str, int], resized: tuple[int, int]
) -> None:
    assert SPEC.with_options(**options).resized(*size, n_frames, factor=28) == resized


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"fps": 0}, "fps"),
        ({"fps": -1.0}, "fps"),
        ({"fps": float("nan")}, "fps"),
        ({"fps": float("inf")}, "fps"),
        ({"fps": "2"}, "fps"),
        ({"fps": True}, "fps"),
        ({"nframes": 1}, "nframes"),
        ({"nframes": 4.0}, "nframes"),
        ({"nframes": True}, "nframes"),
        ({"nframes": [4]}, "nframes"),
        ({"fps": 2, "nframes": 4}, "nframes"),
        ({"min_pixels": 0}, "min_pixels"),
        ({"max_pixels": 783}, "max_pixels"),
        ({"max_pixels": "many"}, "max_pixels"),
        ({"total_pixels": -5}, "total_pixels"),
        ({"min_pixels": 2000, "max_pixels": 1000}, "max_pixels"),
    ],
)
def test_bad_options_are_refused_by_name(options: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError) as caught:
        SPEC.with_options(**options)
    assert caught.value.field == field
    assert field in str(caught.value)


def test_a_checkpoint_s_own_limits_replace_those_of_qwen_vl_utils() -> None:
    assert VideoSpec.from_hf({}) == SPEC
    flat = {"min_pixels": 12544, "max_pixels": 50176, "fps": 1, "min_frames": 2, "max_frames": 16}
    expected = VideoSpec(fps=1, min_frames=2, max_frames=16, min_pixels=12544, max_pixels=50176)
    assert VideoSpec.from_hf(flat) == expected
    assert VideoSpec.from_hf({"size": {"shortest_edge": 12544, "longest_edge": 50176}}).max_pixels == 50176
    assert expected.with_options(max_pixels=10_000).resized(480, 640, 4, 28) == (84, 112)


@pytest.mark.parametrize(
    "config",
    [
        {"min_pixels": 5, "max_pixels": 4},
        {"min_frames": 8, "max_frames": 4},
        {"fps": "fast"},
        {"fps": -1},
        {"size": [1, 2]},
        {"max_frames": {}, "min_frames": 1},
    ],
)
def test_a_checkpoint_s_nonsense_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="video_preprocessor_config"):
        VideoSpec.from_hf(config)


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
    video = open_video(encoded(numbered(100, (320, 240))), POLICY, SPEC, CUT)
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
        (png(Image.new("RGB", (30, 30))), "known format"),
        (sound(), "no video"),
        (sound("matroska"), "no video"),
        (encoded(numbered(9), "flv", "flv1"), "known format"),
        (encoded(numbered(9), "avi", "wmv2"), "codec"),
        (encoded(numbered(9))[:600], "damaged"),
        (encoded(numbered(40), "avi", "mpeg4")[:-3500], "damaged"),
        (encoded(numbered(40), options={"movflags": "faststart", "g": "5"})[:-200], "damaged|no frames"),
    ],
    ids=["text", "image", "sound", "more sound", "format", "codec", "cut MP4", "cut AVI", "cut end"],
)
def test_what_is_no_whole_video_is_refused(data: bytes, message: str) -> None:
    assert any(part in refusal(data) for part in message.split("|"))


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
        ({"video_timeout_s": 0}, "took longer than 0 seconds"),
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
