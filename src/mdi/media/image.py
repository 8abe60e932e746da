"""Decodes image files: upright, in RGB, within the policy's size."""

from __future__ import annotations

import io

import numpy as np
from PIL import ExifTags, Image, ImageFile

from mdi.core.config import MediaPolicy
from mdi.core.errors import MediaError
from mdi.media.ancillary import without_ancillary
from mdi.media.known import RAW, is_camera_raw, known_as
from mdi.media.work import Work

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")  # an MPO is a JPEG that holds several


DECODING_BYTES = 8  # for a pixel: as decoded, and a copy in RGB or turned upright


class _DamagedError(MediaError):
    """A decoder refuses the file."""


def decode_image(data: bytes, policy: MediaPolicy, work: Work | None = None) -> Image.Image:
    """The first frame of an encoded image, upright, in mode RGB, transparency shown on white.

    The picture is what counts: text, profiles and other data beside it may be broken or huge, as in a browser.
    work: reserves the memory that decoding takes.

    Raises MediaError when the bytes are not an image of a known format, are damaged or cut off, or when their
    header announces more pixels than the policy allows (nothing is decoded then).
    """
    format_name = _format_of(data)
    try:
        return _decode(data, format_name, policy, work)
    except _DamagedError:
        shorter = without_ancillary(data, format_name)
        if shorter is None:
            raise
    return _decode(shorter, format_name, policy, work)


def _decode(data: bytes, format_name: str, policy: MediaPolicy, work: Work | None) -> Image.Image:
    image = _opened(data, format_name)
    if image.width * image.height > policy.max_image_pixels:
        raise MediaError(
            f"the image is {image.width} x {image.height} pixels, above the limit of "
            f"{policy.max_image_pixels} pixels; send a smaller one"
        )
    if work:
        work.reserve(image.width * image.height * DECODING_BYTES)
    try:
        image.load()
        return _to_rgb(_upright(image))
    except Exception as error:  # Pillow's decoders raise whatever their format's damage leads to
        raise _DamagedError(f"the {image.format} image is damaged or cut off") from error


def _format_of(data: bytes) -> str:
    """The name of the file's format, by its first bytes. Raises MediaError for what is not read here."""
    Image.init()
    named = RAW if is_camera_raw(data) else known_as(data)
    if named:
        raise MediaError(f"this is {named}")
    for name in FORMATS:
        _, accepts = Image.OPEN.get(name, (None, None))
        if accepts is not None and accepts(data[:16]) is True:
            return name
    raise MediaError(f"this is not an image in a known format ({', '.join(FORMATS)})")


def _opened(data: bytes, format_name: str) -> ImageFile.ImageFile:
    """Reads the header only. Not Image.open, whose own pixel limit is a setting of the whole process."""
    opener, _ = Image.OPEN[format_name]
    try:
        return opener(io.BytesIO(data), "")
    except Image.DecompressionBombError as error:
        raise MediaError(f"the {format_name} image has too many pixels; send a smaller one") from error
    except Exception as error:
        raise _DamagedError(f"the {format_name} image is damaged or cut off") from error


_UPRIGHT = {  # EXIF orientation -> the transposition that undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _upright(image: Image.Image) -> Image.Image:
    """Like ImageOps.exif_transpose, but it does not copy upright images and ignores broken EXIF blocks."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:
        orientation = None
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _eight_bit(image).convert("RGB")
    if image.has_transparency_data:
        return on_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def on_white(image: Image.Image) -> Image.Image:
    """A picture with transparency as RGB, white behind it."""
    if image.mode == "La":  # Pillow does not convert it to RGBA directly
        image = image.convert("LA")
    image = image if image.mode == "RGBA" else image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image.getchannel("A"))
    return white


_WHITE_LEVELS = {"I": (2**16 - 1, 2**31 - 1), "F": (1, 2**8 - 1, 2**16 - 1)}


def _eight_bit(image: Image.Image) -> Image.Image:
    """Deep greyscale on the scale of 0 to 255, where Pillow would clip.

    Linear, as the PNG specification (section 13.12) has it for 16 bits. Files of 32-bit numbers do not say
    what white is: it is the first usual level that no pixel exceeds.
    """
    values = np.nan_to_num(np.asarray(image).astype(np.float32))
    peak = float(values.max())
    levels = _WHITE_LEVELS.get(image.mode, (2**16 - 1,))
    white = next((level for level in levels if peak <= level), peak)
    grey = np.rint(values.clip(0, white) * (255 / white)).astype(np.uint8)
    if isinstance(clear := image.info.get("transparency"), int):
        grey[values == clear] = 255
    return Image.fromarray(grey)
