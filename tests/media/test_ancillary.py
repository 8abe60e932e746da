"""C8: pictures are shown whatever stands beside them in their files: broken, huge or unknown."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
import skimage
from PIL import ExifTags, Image

from mdi.media import MediaPolicy, decode_image


def photograph() -> Image.Image:
    return Image.fromarray(skimage.data.coffee()).resize((120, 80))


def encoded(kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    photograph().save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(data: bytes) -> np.ndarray:
    return np.asarray(decode_image(data, MediaPolicy()))


# PNG


def chunk(kind: bytes, body: bytes, *, broken: bool = False) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body) ^ broken)


HUGE = zlib.compress(bytes(2 * 2**20))
LARGE = zlib.compress(bytes(2**20 - 1))
PNG_EXTRAS = {
    "huge zTXt": chunk(b"zTXt", b"Comment\0\0" + HUGE),
    "much zTXt": b"".join(chunk(b"zTXt", b"Comment %d\0\0" % index + LARGE) for index in range(70)),
    "huge iTXt": chunk(b"iTXt", b"Comment\0\1\0\0\0" + HUGE),
    "huge iCCP": chunk(b"iCCP", b"profile\0\0" + HUGE),
    "iCCP of an unknown method": chunk(b"iCCP", b"profile\0\7" + HUGE),
    "empty iCCP": chunk(b"iCCP", b""),
    "huge eXIf": chunk(b"eXIf", b"II*\0" + bytes(2**20)),
    "broken checksum": chunk(b"tEXt", b"Comment\0text", broken=True),
    "private": chunk(b"prVt", b"secret" * 100),
    "private with a broken checksum": chunk(b"prVt", b"secret", broken=True),
    "short gAMA": chunk(b"gAMA", b"\0"),
    "short cHRM": chunk(b"cHRM", b"\0" * 7),
    "short pHYs": chunk(b"pHYs", b"\0" * 7),
    "empty sRGB": chunk(b"sRGB", b""),
    "short acTL": chunk(b"acTL", b"\0"),
    "fcTL out of order": chunk(b"fcTL", bytes(3) + b"\5" + bytes(22)),
}


@pytest.mark.parametrize("extra", PNG_EXTRAS)
@pytest.mark.parametrize("place", ["before", "after"])
def test_a_png_is_shown_whatever_is_in_its_ancillary_chunks(extra: str, place: str) -> None:
    whole = encoded("PNG")
    at = 33 if place == "before" else len(whole) - 12
    np.testing.assert_array_equal(decoded(whole[:at] + PNG_EXTRAS[extra] + whole[at:]), decoded(whole))


def test_the_orientation_survives_broken_chunks_beside_it() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    whole = encoded("PNG", exif=exif)
    data = whole[:33] + PNG_EXTRAS["huge zTXt"] + whole[33:]
    np.testing.assert_array_equal(decoded(data), decoded(whole))
    assert decoded(data).shape == (120, 80, 3)


def test_a_png_that_is_cut_off_behind_its_picture_is_shown() -> None:
    whole = encoded("PNG")
    np.testing.assert_array_equal(decoded(whole[:-12] + PNG_EXTRAS["huge zTXt"][:100]), decoded(whole))


# JPEG


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


JPEG_EXTRAS = {
    "many APP1": segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + bytes(60_000)) * 200,
    "broken JFIF": segment(0xE0, b"JFIF\0"),
    "broken profile": segment(0xE2, b"ICC_PROFILE\0\x09\x01" + bytes(50)),
    "broken MPF": segment(0xE2, b"MPF\0II*\0\xff\xff\xff\xff"),
    "empty MPF": segment(0xE2, b"MPF\0"),
    "broken Photoshop block": segment(0xED, b"Photoshop 3.0\x008BIM\x04\x04\xff"),
    "empty EXIF": segment(0xE1, b"Exif\0\0"),
    "comment": segment(0xFE, b"\xff" * 65_000),
    "private": b"".join(segment(0xE0 + index, b"?" * 20) for index in range(3, 14)),
}


@pytest.mark.parametrize("extra", JPEG_EXTRAS)
def test_a_jpeg_is_shown_whatever_is_in_its_application_segments(extra: str, recwarn: pytest.WarningsRecorder) -> None:
    whole = encoded("JPEG")
    np.testing.assert_array_equal(decoded(whole[:2] + JPEG_EXTRAS[extra] + whole[2:]), decoded(whole))


# WebP, GIF, TIFF


@pytest.mark.parametrize("kind", [b"EXIF", b"XMP ", b"ICCP", b"prVt"])
@pytest.mark.parametrize(("size", "missing"), [(8, 0), (0, 0), (800, 300)])
def test_a_webp_is_shown_whatever_its_metadata(kind: bytes, size: int, missing: int) -> None:
    whole = encoded("WEBP", lossless=True)
    head = struct.pack("<4sIB3x", b"VP8X", 10, 0x2C) + struct.pack("<I", 119)[:3] + struct.pack("<I", 79)[:3]
    extra = struct.pack("<4sI", kind, size) + bytes(size - missing)
    chunks = b"WEBP" + head + whole[12:] + extra
    data = b"RIFF" + struct.pack("<I", len(chunks) + missing) + chunks
    np.testing.assert_array_equal(decoded(data), decoded(whole))


@pytest.mark.parametrize("label", [0xFE, 0xFF, 0x77])
def test_a_gif_is_shown_whatever_its_extensions(label: int) -> None:
    whole = encoded("GIF")
    start = 13 + 3 * 2 ** ((whole[10] & 7) + 1)
    extension = b"!" + bytes([label]) + (b"\xff" + b"?" * 255) * 8000 + b"\0"
    np.testing.assert_array_equal(decoded(whole[:start] + extension + whole[start:]), decoded(whole))


ODD_TAGS = ((270, 2, 2**31, 8), (34665, 4, 1, 2**32 - 1), (65000, 99, 1, 0), (305, 2, 4, 2**32 - 2), (700, 7, 2**30, 0))


@pytest.mark.parametrize("tag", ODD_TAGS)
@pytest.mark.parametrize("compression", [None, "tiff_deflate"])
def test_a_tiff_is_shown_whatever_its_other_tags(
    tag: tuple[int, int, int, int], compression: str | None, recwarn: pytest.WarningsRecorder
) -> None:
    whole = encoded("TIFF", compression=compression)
    (start,) = struct.unpack_from("<I", whole, 4)
    (count,) = struct.unpack_from("<H", whole, start)
    entries = [whole[at : at + 12] for at in range(start + 2, start + 2 + 12 * count, 12)]
    entries = sorted([*entries, struct.pack("<HHII", *tag)], key=lambda entry: struct.unpack_from("<H", entry))
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    data = whole[:4] + struct.pack("<I", len(whole)) + whole[8:] + directory
    np.testing.assert_array_equal(decoded(data), decoded(whole))
