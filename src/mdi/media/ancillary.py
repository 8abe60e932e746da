"""Image files without what is not the picture: texts, profiles, thumbnails, private data.

Decoders refuse a whole file for one broken or huge chunk of these, where a browser shows the picture. What decides how
the picture looks stays: sizes, palettes, transparency, the orientation (EXIF), the colour transform of a JPEG.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator, Mapping

MAX_EXIF_BYTES = 65536  # with the orientation; as in a JPEG, where a segment is never longer

PNG_KEPT = frozenset((b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"))
PNG_END = struct.pack(">I4sI", 0, b"IEND", zlib.crc32(b"IEND"))
WEBP_PICTURE = frozenset((b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF"))
WEBP_METADATA_FLAGS = 0x20 | 0x08 | 0x04  # profile, EXIF, XMP
JPEG_KEPT = {0xE1: b"Exif\0\0", 0xEE: b"Adobe"}  # Adobe's names the colour transform
TIFF_KEPT = frozenset(
    (*range(254, 285), 292, 293, 297, 317, 320, *range(321, 326), 332, 338, 339, 340, 341, 347, *range(529, 533))
)


def without_ancillary(data: bytes, format_name: str) -> bytes | None:
    """The same picture in a shorter file; None where there is nothing to leave out, or the format is not known."""
    strip = _STRIPPERS.get(format_name)
    try:
        stripped = strip(data) if strip else data
    except (struct.error, IndexError):  # cut off
        return None
    return stripped if stripped != data else None


def _png(data: bytes) -> bytes:
    """PNG specification, 5.3. Animations lose all but the still picture."""
    kept = [data[:8]]
    for kind, start, end in _png_chunks(data):
        body = data[start + 8 : end - 4]
        if kind in PNG_KEPT:
            kept.append(data[start:end])
        elif kind == b"eXIf" and len(body) <= MAX_EXIF_BYTES:
            kept.append(data[start : end - 4] + struct.pack(">I", zlib.crc32(kind + body)))
    return b"".join([*kept, b"" if kept[-1] == PNG_END else PNG_END])


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start and end of every chunk, up to one that is cut off and not a part of the picture."""
    start = 8
    while start + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, start)
        end = start + 12 + length
        if end > len(data) and kind not in PNG_KEPT:
            return
        yield kind, start, min(end, len(data))
        if kind == b"IEND":
            return
        start = end


def _jpeg(data: bytes) -> bytes:
    """ITU-T T.81, B.1.1: markers and segments up to the first scan; all after it stays."""
    kept, start = [data[:2]], 2
    while data[start] == 0xFF and data[start + 1] != 0xDA:
        marker = data[start + 1]
        if marker == 0xFF:  # fill bytes
            start += 1
            continue
        (length,) = struct.unpack_from(">H", data, start + 2)
        segment = data[start : start + 2 + length]
        is_metadata = 0xE0 <= marker <= 0xEF or marker == 0xFE
        if not is_metadata or segment[4:].startswith(JPEG_KEPT.get(marker, ())):
            kept.append(segment)
        start += 2 + length
    return b"".join([*kept, data[start:]])


def _webp(data: bytes) -> bytes:
    """RIFF container of WebP: chunks of an even length."""
    kept, start = [], 12
    while start + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, start)
        body = data[start + 8 : start + 8 + length]
        if kind == b"VP8X":
            body = bytes([body[0] & ~WEBP_METADATA_FLAGS]) + body[1:]
        if kind in WEBP_PICTURE:
            kept.append(struct.pack("<4sI", kind, length) + body + b"\0" * (length % 2))
        start += 8 + length + length % 2
    body = b"WEBP" + b"".join(kept)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _tiff(data: bytes) -> bytes:
    """TIFF 6.0, section 2: the first directory, with the tags of baseline and of its usual extensions only."""
    order = {b"II*\0": "<", b"MM\0*": ">"}[data[:4]] if data[:4] in (b"II*\0", b"MM\0*") else None
    if order is None:
        return data
    (start,) = struct.unpack_from(order + "I", data, 4)
    (count,) = struct.unpack_from(order + "H", data, start)
    entries = [data[at : at + 12] for at in range(start + 2, start + 2 + 12 * count, 12)]
    kept = [entry for entry in entries if struct.unpack_from(order + "H", entry)[0] in TIFF_KEPT]
    directory = struct.pack(order + "H", len(kept)) + b"".join(kept) + bytes(4)
    return data[:start] + directory + data[start + len(directory) :]


_STRIPPERS: Mapping[str, Callable[[bytes], bytes]] = {"PNG": _png, "JPEG": _jpeg, "WEBP": _webp, "TIFF": _tiff}
