"""C9: files that are not read are named, with what to do: HEIC above all, and what people send instead of images."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import Image, features

from mdi.core.errors import MediaError
from mdi.media import MediaPolicy, PatchSpec, VideoSpec, decode_image, open_video

POLICY = MediaPolicy()


def brands(major: str, *others: str) -> bytes:
    body = major.encode() + bytes(4) + "".join(others).encode()
    return struct.pack(">I4s", len(body) + 8, b"ftyp") + body + bytes(2000)


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (60, 40), "teal").save(buffer, kind)
    return buffer.getvalue()


def raw_tiff(*tags: tuple[int, int, int, int]) -> bytes:
    """A TIFF whose first directory has these tags, as cameras write them."""
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(200)


HEIC = "HEIC/HEIF, which is not supported: convert it to JPEG or PNG"
NAMED = {
    **{name: (brands(name), HEIC) for name in ("heic", "heix", "hevc", "heim", "mif1", "msf1")},
    "HEIF of brand mif1": (brands("mif1", "mif1", "heic"), HEIC),
    "JPEG XL": (b"\xff\x0a" + bytes(100), "JPEG XL.* convert it"),
    "JPEG XL in a container": (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(100), "JPEG XL.* convert it"),
    "SVG": (b"<?xml version='1.0'?>\n<!-- drawn -->\n<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG.* convert it"),
    "PDF": (b"%PDF-1.7\n" + bytes(100), "a PDF.* send its pages as images"),
    "PSD": (b"8BPS" + bytes(100), "Photoshop.* convert it"),
    "DNG": (raw_tiff((254, 4, 1, 1), (50706, 1, 4, 0x00000401)), "raw file.* convert it"),
    "NEF": (raw_tiff((254, 4, 1, 1), (330, 4, 1, 8)), "raw file.* convert it"),
    "CR2": (b"II*\0\x10\0\0\0CR\2\0" + bytes(100), "raw file.* convert it"),
    "CR3": (brands("crx "), "raw file.* convert it"),
    "MP4": (brands("isom", "mp41"), "a video: send it as a video"),
    "WebM": (b"\x1a\x45\xdf\xa3" + bytes(100), "a video: send it as a video"),
    "AVI": (b"RIFF\0\0\0\0AVI LIST", "a video: send it as a video"),
    "MPEG-TS": ((b"\x47" + bytes(187)) * 5, "a video: send it as a video"),
    "web page": (b"\n<!DOCTYPE html><html><body>404</body></html>", "an HTML page: give the address of the file"),
    "Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n", "run `git lfs pull`"),
    "ZIP": (b"PK\x03\x04" + bytes(100), "a ZIP archive: unpack it"),
}


@pytest.mark.parametrize("what", NAMED)
def test_what_is_sent_instead_of_an_image_is_named_with_a_remedy(what: str) -> None:
    data, message = NAMED[what]
    with pytest.raises(MediaError, match=message) as caught:
        decode_image(data, POLICY)
    assert "damaged" not in str(caught.value)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
def test_an_image_sent_as_a_video_is_named(kind: str) -> None:
    with pytest.raises(MediaError, match=rf"an image \({kind}\), not a video: send it as an image"):
        open_video(encoded(kind), POLICY, VideoSpec(), PatchSpec())


@pytest.mark.parametrize("what", ["web page", "Git LFS pointer", "ZIP", "PDF"])
def test_what_is_sent_instead_of_a_video_is_named_too(what: str) -> None:
    data, message = NAMED[what]
    with pytest.raises(MediaError, match=message):
        open_video(data, POLICY, VideoSpec(), PatchSpec())


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_avif_of_a_general_brand_is_read() -> None:
    """The brands that a file is compatible with count, not only its major one."""
    whole = encoded("AVIF")
    data = whole[:8] + b"mif1" + whole[12:]
    assert b"avif" in data[16:64]
    np.testing.assert_array_equal(np.asarray(decode_image(data, POLICY)), np.asarray(decode_image(whole, POLICY)))
