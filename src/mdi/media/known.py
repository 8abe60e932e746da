"""What files are that are no image or video to be read here: named, with a remedy. Looks at their first bytes only."""

from __future__ import annotations

import re
import struct

CONVERT = "convert it to JPEG or PNG"
HEIF_BRANDS = frozenset(b"heic heix heim heis hevc hevx hevm hevs mif1 mif2 msf1 miaf avci".split())
AVIF_BRANDS = frozenset((b"avif", b"avis"))
RAW = f"a camera's raw file (DNG, CR2, NEF, ARW and others), which is not supported: {CONVERT}"
VIDEO = "a video: send it as a video"

_BEGINNINGS: tuple[tuple[bytes, str], ...] = (
    (b"\xff\x0a", f"JPEG XL, which is not supported: {CONVERT}"),
    (b"\0\0\0\x0cJXL ", f"JPEG XL, which is not supported: {CONVERT}"),
    (b"\0\0\0\x0cjP  ", f"JPEG 2000, which is not supported: {CONVERT}"),
    (b"\xff\x4f\xff\x51", f"JPEG 2000, which is not supported: {CONVERT}"),
    (b"8BPS", f"a Photoshop file (PSD), which is not supported: {CONVERT}"),
    (b"\0\0\x01\0", f"an icon (ICO), which is not supported: {CONVERT}"),
    (b"DDS ", f"a texture (DDS), which is not supported: {CONVERT}"),
    (b"%!PS", "PostScript, which is not supported: send its pages as images (JPEG or PNG)"),
    (b"%PDF-", "a PDF, which is not supported: send its pages as images (JPEG or PNG)"),
    (b"FUJIFILMCCD-RAW", RAW),
    (b"IIRO", RAW),
    (b"IIRS", RAW),
    (b"IIU\0", RAW),
    (b"II*\0\x10\0\0\0CR", RAW),
    (b"PK\x03\x04", "a ZIP archive: unpack it, and send the files in it"),
    (b"\x1f\x8b", "compressed with gzip: unpack it, and send the file in it"),
    (b"version https://git-lfs", "a Git LFS pointer instead of the file itself: run `git lfs pull`, and send it then"),
    (b"\x1a\x45\xdf\xa3", VIDEO),
    (b"FLV", VIDEO),
    (b"\0\0\x01\xba", VIDEO),
)
_HTML = re.compile(rb"\s*(<!--.*?-->\s*)*<(!doctype html|html|head|body)\b", re.IGNORECASE | re.DOTALL)
_SVG = re.compile(rb"\s*(<\?xml.*?\?>|<!--.*?-->|<!DOCTYPE svg.*?>|\s)*<svg\b", re.IGNORECASE | re.DOTALL)
_IMAGES: tuple[tuple[bytes, str], ...] = (
    (b"\x89PNG\r\n", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
)
_DNG_VERSION, _SUBFILE_TYPE, _SUB_IFDS = 50706, 254, 330


def known_as(data: bytes) -> str | None:
    """What a file is and what to do, for a sentence that begins with "this is". None for what is not known.

    Only of files that cannot be decoded: those of supported formats are not named.
    """
    head = data[:1024]
    if named := next((meaning for magic, meaning in _BEGINNINGS if head.startswith(magic)), None):
        return named
    if (brands := brands_of(data)) and not brands & AVIF_BRANDS:
        if b"crx " in brands:
            return RAW
        return f"HEIC/HEIF, which is not supported: {CONVERT}" if brands & HEIF_BRANDS else VIDEO
    if head.startswith(b"RIFF") and head[8:12] == b"AVI ":
        return VIDEO
    if len(data) > 376 and data[0] == data[188] == data[376] == 0x47:
        return VIDEO
    if _HTML.match(head):
        return "an HTML page: give the address of the file itself, not of a page that shows it"
    if _SVG.match(head):
        return f"SVG, which is not supported: {CONVERT}"
    return None


def known_image(data: bytes) -> str | None:
    """The name of an image format that the file has, for what is expected to be a video."""
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WEBP"
    return next((name for magic, name in _IMAGES if data.startswith(magic)), None)


def brands_of(data: bytes) -> frozenset[bytes]:
    """The brands of an ISO base media file (ISO/IEC 14496-12, 4.3), the major one and those it is compatible with."""
    if data[4:8] != b"ftyp":
        return frozenset()
    (size,) = struct.unpack_from(">I", data)
    brands = data[8:12] + data[16 : min(size, 1024)]
    return frozenset(brands[start : start + 4] for start in range(0, len(brands) - 3, 4))


def is_camera_raw(data: bytes) -> bool:
    """Whether a TIFF file is a raw one, whose first picture is a thumbnail: DNG, NEF, ARW, PEF and others."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(data[:4])
    if order is None or len(data) < 10:
        return False
    (start,) = struct.unpack_from(order + "I", data, 4)
    if start + 2 > len(data):
        return False
    (count,) = struct.unpack_from(order + "H", data, start)
    entries = data[start + 2 : start + 2 + 12 * count]
    tags = {
        struct.unpack_from(order + "H", entries, at)[0]: entries[at + 8 : at + 12]
        for at in range(0, len(entries) - 11, 12)
    }
    is_thumbnail = any(tags.get(_SUBFILE_TYPE, b"")) and _SUB_IFDS in tags
    return _DNG_VERSION in tags or is_thumbnail
