"""Every kind of image file in, the right pixels or the right refusal out."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import skimage
from PIL import ExifTags, Image, ImageFile, features

from mdi.core.errors import MediaError
from mdi.media import MediaPolicy, PatchSpec, decode_image, image_patches

POLICY = MediaPolicy()

HAS_AVIF = features.check("avif")


def photograph(width: int = 120, height: int = 80) -> Image.Image:
    return Image.fromarray(skimage.data.coffee()).resize((width, height))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(data: bytes) -> np.ndarray:
    image = decode_image(data, POLICY)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def ramp(dtype: str, high: int) -> np.ndarray:
    """[16, 256]: every row goes from 0 to `high` in equal steps."""
    return np.tile(np.linspace(0, high, 256).round(), (16, 1)).astype(dtype)


# Formats


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP", "TIFF", "WEBP"])
def test_a_lossless_format_gives_the_very_pixels(kind: str) -> None:
    image = photograph()
    if kind == "GIF":
        image = image.quantize(200).convert("RGB")
    data = encoded(image, kind, **({"lossless": True} if kind == "WEBP" else {}))
    np.testing.assert_array_equal(decoded(data), np.asarray(image))


@pytest.mark.parametrize(
    "kind",
    ["JPEG", "MPO", "WEBP", pytest.param("AVIF", marks=pytest.mark.skipif(not HAS_AVIF, reason="no AVIF"))],
)
def test_a_lossy_format_gives_nearly_the_pixels(kind: str) -> None:
    others = {"save_all": True, "append_images": [photograph().rotate(180)]} if kind == "MPO" else {}
    data = encoded(photograph(), kind, quality=95, **others)
    assert np.abs(decoded(data) - np.asarray(photograph())).mean() < 4


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animated_file_the_first_frame_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", (40, 30), colour) for colour in ("red", "lime", "blue")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert np.abs(decoded(data) - (255, 0, 0)).max() < 8


@pytest.mark.parametrize("kind", ["ICO", "PPM", "PDF", "TGA", "EPS", "JPEG2000", "DDS"])
def test_a_format_off_the_list_is_refused(kind: str) -> None:
    with pytest.raises(MediaError, match=r"known format|not supported: (convert it|send its pages)"):
        decode_image(encoded(photograph(64, 64), kind), POLICY)


# Colour modes


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "GIF"])
def test_alpha_is_composited_on_white(kind: str) -> None:
    pixels = np.zeros((4, 3, 4), dtype=np.uint8)
    pixels[..., 0] = 200  # red, over a hidden black
    pixels[:, 0, 3], pixels[:, 1, 3], pixels[:, 2, 3] = 255, 0, 0 if kind == "GIF" else 51
    data = encoded(Image.fromarray(pixels), kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {}))
    faint = (255, 255, 255) if kind == "GIF" else (244, 204, 204)  # a fifth of (200, 0, 0), the rest white
    assert decoded(data)[0].tolist() == [[200, 0, 0], [255, 255, 255], list(faint)]


def test_grey_with_alpha_is_composited_on_white() -> None:
    image = Image.merge("LA", [Image.new("L", (2, 2), 100), Image.new("L", (2, 2), 51)])
    for kind in ("PNG", "TIFF"):
        assert decoded(encoded(image, kind))[0, 0].tolist() == [224, 224, 224]


def test_palette_colours_are_looked_up_and_transparent_ones_are_white() -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 200, 0, 0, 0, 0, 200])
    image.putdata([0, 1, 2])
    assert decoded(encoded(image, "PNG"))[0].tolist() == [[10, 20, 30], [200, 0, 0], [0, 0, 200]]
    one_clear = encoded(image, "PNG", transparency=1)
    assert decoded(one_clear)[0].tolist() == [[10, 20, 30], [255, 255, 255], [0, 0, 200]]
    half_clear = encoded(image, "PNG", transparency=bytes([255, 0, 51]))
    assert decoded(half_clear)[0].tolist() == [[10, 20, 30], [255, 255, 255], [204, 204, 244]]


def test_a_transparent_colour_without_alpha_channel_is_white() -> None:
    rgb = Image.fromarray(np.array([[[1, 2, 3], [9, 9, 9]]], dtype=np.uint8))
    assert decoded(encoded(rgb, "PNG", transparency=(1, 2, 3)))[0].tolist() == [[255] * 3, [9] * 3]
    grey = Image.fromarray(np.array([[7, 9]], dtype=np.uint8))
    assert decoded(encoded(grey, "PNG", transparency=7))[0].tolist() == [[255] * 3, [9] * 3]
    deep = Image.fromarray(np.array([[7 * 257, 9 * 257]], dtype=np.uint16))
    assert decoded(encoded(deep, "PNG", transparency=7 * 257))[0].tolist() == [[255] * 3, [9] * 3]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_and_not_clipped(kind: str) -> None:
    data = encoded(Image.fromarray(ramp("uint16", 65535)), kind)
    np.testing.assert_array_equal(decoded(data)[0, :, 0], np.arange(256))


def test_big_endian_16_bit_grey_is_scaled_and_not_clipped() -> None:
    image = Image.frombytes("I;16B", (256, 16), ramp(">u2", 65535).tobytes())
    data = encoded(image, "TIFF")
    assert Image.open(io.BytesIO(data)).mode == "I;16B"
    np.testing.assert_array_equal(decoded(data)[0, :, 0], np.arange(256))


@pytest.mark.parametrize(
    ("dtype", "high"),
    [("int32", 65535), ("int32", 2**31 - 1), ("float32", 1), ("float32", 255), ("float32", 65535)],
)
def test_32_bit_grey_is_scaled_by_the_white_it_must_have(dtype: str, high: int) -> None:
    pixels = (np.tile(np.arange(256), (16, 1)) / 255 * high).astype(dtype)
    data = encoded(Image.fromarray(pixels), "TIFF")
    assert Image.open(io.BytesIO(data)).mode in ("I", "F")
    assert np.abs(decoded(data)[0, :, 0] - np.arange(256)).max() <= (1 if high == 2**31 - 1 else 0)


def test_grey_with_numbers_that_are_none_is_still_an_image() -> None:
    pixels = ramp("float32", 1)
    pixels[0, 0] = np.nan
    assert decoded(encoded(Image.fromarray(pixels), "TIFF"))[1, 255].tolist() == [255] * 3


def test_cmyk_becomes_rgb() -> None:
    image = photograph().convert("CMYK")
    expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(decoded(encoded(image, "TIFF")), expected)
    assert np.abs(decoded(encoded(image, "JPEG", quality=95)) - expected).mean() < 4


def test_one_bit_and_grey_become_rgb() -> None:
    for mode in ("1", "L"):
        image = photograph().convert(mode)
        np.testing.assert_array_equal(decoded(encoded(image, "PNG")), np.asarray(image.convert("RGB")))


# Orientation

TURNS = {
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(pixels, 2).transpose(1, 0, 2),
    8: lambda pixels: np.rot90(pixels, 1),
}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = encoded(photograph(), kind, exif=exif)
    stored = decoded(encoded(photograph(), kind))
    np.testing.assert_array_equal(decoded(data), TURNS[orientation](stored))


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"]
)
def test_a_broken_exif_block_does_not_spoil_the_image(exif: bytes, recwarn: pytest.WarningsRecorder) -> None:
    data = encoded(photograph(), "JPEG", exif=exif)
    np.testing.assert_array_equal(decoded(data), decoded(encoded(photograph(), "JPEG")))


# Refusals


@pytest.mark.parametrize("data", [b"", b"x", b"no picture", bytes(1000), b"RIFF\0\0\0\0WEBPnope"])
def test_what_is_not_an_image_is_refused(data: bytes) -> None:
    with pytest.raises(MediaError, match="not an image in a known format") as caught:
        decode_image(data, POLICY)
    assert caught.value.field == "image"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"])
@pytest.mark.parametrize("kept", [0.02, 0.5, 0.9])
def test_a_truncated_image_is_refused(kind: str, kept: float) -> None:
    data = encoded(photograph(600, 400), kind)
    with pytest.raises(MediaError, match=f"the {kind} image is damaged or cut off") as caught:
        decode_image(data[: max(20, int(len(data) * kept))], POLICY)
    assert "BytesIO" not in str(caught.value)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"])
def test_flipped_bytes_give_an_image_or_a_refusal_and_nothing_else(kind: str, recwarn: pytest.WarningsRecorder) -> None:
    data = encoded(photograph(), kind)
    random = np.random.default_rng(0)
    for _ in range(60):
        damaged = np.frombuffer(data, dtype=np.uint8).copy()
        damaged[random.integers(8, len(data), 5)] = random.integers(0, 256, 5)
        with contextlib.suppress(MediaError):
            assert decode_image(damaged.tobytes(), MediaPolicy(max_image_pixels=10**6)).mode == "RGB"


def png_that_claims(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(20_000, 6001), (30_000, 30_000), (2**31 - 1, 2**31 - 1)])
def test_an_image_above_the_pixel_limit_is_refused_before_decoding(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(MediaError, match=f"{size[0]} x {size[1]} pixels, above the limit of 120000000"):
        decode_image(png_that_claims(*size), POLICY)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"])
def test_the_pixel_limit_holds_for_every_format(kind: str) -> None:
    data = encoded(photograph(100, 50), kind)
    with pytest.raises(MediaError, match="100 x 50 pixels, above the limit of 4999 pixels"):
        decode_image(data, MediaPolicy(max_image_pixels=4999))
    assert decode_image(data, MediaPolicy(max_image_pixels=5000)).size == (100, 50)


def test_the_pixel_limit_is_the_policy_s_and_pillow_s_own_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = encoded(photograph(), "JPEG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert decode_image(data, POLICY).size == (120, 80)
    assert Image.MAX_IMAGE_PIXELS == 10


def test_many_threads_decode_at_once() -> None:
    files = [encoded(photograph(200 + i, 100), kind) for i in range(8) for kind in ("JPEG", "PNG", "WEBP")]
    with ThreadPoolExecutor(8) as pool:
        parallel = list(pool.map(lambda data: image_patches(decode_image(data, POLICY), PatchSpec()).digest, files))
    assert parallel == [image_patches(decode_image(data, POLICY), PatchSpec()).digest for data in files]
