"""From an encoded image to the rows of pixels that Qwen2-VL's vision tower reads, equal to transformers'.

Knows nothing about where the bytes came from, nor about tokens, models or torch.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image

from mdi.core.errors import CheckpointError, InputError, MediaError
from mdi.media.fetch import fetch
from mdi.media.policy import MediaPolicy

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")  # an MPO is a JPEG that holds several
MAX_ASPECT_RATIO = 200
DEFAULT_MAX_TOKENS = 1280  # of one image: 1,003,520 pixels where a token is 28 x 28
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class PatchSpec:
    """How a checkpoint wants its images cut; mean and std, by channel, on a scale of 0 to 1.

    A patch is patch_size x patch_size pixels of temporal_patch_size frames; merge_size x merge_size patches
    become one token of the language model. Images are resized to between min_pixels and max_pixels.
    """

    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    min_pixels: int = 3136
    max_pixels: int = 1003520
    image_mean: tuple[float, float, float] = CLIP_MEAN
    image_std: tuple[float, float, float] = CLIP_STD
    rescale_factor: float = 1 / 255

    @classmethod
    def from_hf(cls, preprocessor_config: Mapping[str, Any]) -> PatchSpec:
        """Reads preprocessor_config.json, or the `image_processor` part of processor_config.json.

        max_pixels is the checkpoint's, but not above 1280 tokens: raise it with `with_pixels`.
        Raises CheckpointError when the file asks for something this code does not do.
        """
        config = preprocessor_config.get("image_processor", preprocessor_config)
        try:
            return _spec_from(cls(), config)
        except (TypeError, ValueError, AttributeError) as error:
            raise CheckpointError("preprocessor_config.json holds values that are not image sizes") from error

    @property
    def factor(self) -> int:
        """Side of the square of pixels behind one token; the resized height and width are multiples of it."""
        return self.patch_size * self.merge_size

    def with_pixels(self, min_pixels: int | None, max_pixels: int | None) -> PatchSpec:
        """The same cut with another pixel budget; None keeps what is there.

        Raises InputError, naming the field, unless 1 <= min_pixels <= max_pixels and one token fits.
        """
        check_pixels("min_pixels", min_pixels, 1)
        check_pixels("max_pixels", max_pixels, self.factor**2)
        spec = replace(
            self,
            min_pixels=self.min_pixels if min_pixels is None else min_pixels,
            max_pixels=self.max_pixels if max_pixels is None else max_pixels,
        )
        if spec.min_pixels > spec.max_pixels:
            field = "min_pixels" if max_pixels is None else "max_pixels"
            raise InputError(f"min_pixels ({spec.min_pixels}) must not be above max_pixels ({spec.max_pixels})", field)
        return spec

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width that an image of this height and width is resized to (see `smart_resize`)."""
        return smart_resize(height, width, self.factor, self.min_pixels, self.max_pixels)


@dataclass(frozen=True, eq=False)
class Patches:
    """One image or video as the vision tower reads it.

    rows: float32 [grid_t * grid_h * grid_w, channels * temporal * patch * patch], in merge order: the
        merge_size^2 patches of a token follow each other.
    grid: patches along time, height and width.
    digest: SHA-256 of the resized pixels and of all that turns them into rows; equal digests mean equal rows.
    """

    rows: npt.NDArray[np.float32]
    grid: tuple[int, int, int]
    digest: bytes
    merge_size: int = 2

    @property
    def n_tokens(self) -> int:
        """Tokens it takes in the prompt."""
        return math.prod(self.grid) // self.merge_size**2


def load_image(source: str | bytes | Path, policy: MediaPolicy, spec: PatchSpec) -> Patches:
    """Fetches, decodes and cuts one image. Raises MediaError as its three steps do."""
    return image_patches(decode_image(fetch(source, policy), policy), spec)


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: float) -> tuple[int, int]:
    """Height and width, multiples of `factor`, closest to the image's own within the pixel budget.

    Exactly transformers.models.qwen2_vl.image_processing_qwen2_vl.smart_resize, rounding included.
    Raises MediaError when one side is more than 200 times the other.
    """
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise MediaError(
            f"a picture of {width} x {height} pixels is too long: one side may be at most {MAX_ASPECT_RATIO} times the "
            "other; crop it or split it into several"
        )
    new_height = round(height / factor) * factor
    new_width = round(width / factor) * factor
    if new_height * new_width > max_pixels:
        shrink = math.sqrt((height * width) / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


def decode_image(data: bytes, policy: MediaPolicy) -> Image.Image:
    """The first frame of an encoded image, upright, in mode RGB, transparency shown on white.

    Raises MediaError when the bytes are not an image of a known format, are damaged or cut off, or when their
    header announces more pixels than the policy allows (nothing is decoded then).
    """
    image = _open(data)
    if image.width * image.height > policy.max_image_pixels:
        raise MediaError(
            f"the image is {image.width} x {image.height} pixels, above the limit of "
            f"{policy.max_image_pixels} pixels; send a smaller one"
        )
    try:
        image.load()
        return _to_rgb(_upright(image))
    except Exception as error:  # Pillow's decoders raise whatever their format's damage leads to
        raise MediaError(f"the {image.format} image is damaged or cut off") from error


def image_patches(image: Image.Image, spec: PatchSpec) -> Patches:
    """Resizes an RGB image and cuts it into rows, equal to transformers' Qwen2VLImageProcessorPil.

    A still fills all temporal_patch_size frames of its patches. Raises MediaError for extreme aspect ratios.
    """
    height, width = spec.resized(image.height, image.width)
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))  # uint8 [height, width, 3]
    frame = merge_order(pixels, spec)
    n_patches, n_channels, area = frame.shape
    rows = np.empty((n_patches, n_channels, spec.temporal_patch_size, area), dtype=np.float32)
    for channel, table in enumerate(normalized_bytes(spec)):
        rows[:, channel] = table[frame[:, channel, None]]
    grid = (1, height // spec.patch_size, width // spec.patch_size)
    return Patches(rows.reshape(n_patches, -1), grid, digest_of(pixels, spec), spec.merge_size)


def _open(data: bytes) -> Image.Image:
    """Reads the header only. Not Image.open, whose own pixel limit is a setting of the whole process."""
    Image.init()
    for name in FORMATS:
        opener, accepts = Image.OPEN.get(name, (None, None))
        if opener is None or accepts is None or accepts(data[:16]) is not True:
            continue
        try:
            return opener(io.BytesIO(data), "")
        except Image.DecompressionBombError as error:
            raise MediaError(f"the {name} image has too many pixels; send a smaller one") from error
        except Exception as error:
            raise MediaError(f"the {name} image is damaged or cut off") from error
    raise MediaError(f"this is not an image in a known format ({', '.join(FORMATS)})")


_UPRIGHT = {  # EXIF orientation -> what undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _upright(image: Image.Image) -> Image.Image:
    """Like ImageOps.exif_transpose, without its copy of upright images and unmoved by broken EXIF blocks."""
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
    if image.mode == "La":  # Pillow knows no direct way to RGBA
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


def merge_order(pixels: npt.NDArray[np.uint8], spec: PatchSpec) -> npt.NDArray[np.uint8]:
    """A frame [height, width, channels] as [grid_h * grid_w, channels, patch * patch], merge order."""
    height, width, channels = pixels.shape
    merge, patch = spec.merge_size, spec.patch_size
    blocks = pixels.reshape(height // spec.factor, merge, patch, width // spec.factor, merge, patch, channels)
    return np.ascontiguousarray(blocks.transpose(0, 3, 1, 4, 6, 2, 5)).reshape(-1, channels, patch * patch)


def normalized_bytes(spec: PatchSpec) -> npt.NDArray[np.float32]:
    """What each of the 256 byte values becomes, by channel [3, 256]; rounded where transformers rounds."""
    rescaled = (np.arange(256, dtype=np.float64) * spec.rescale_factor).astype(np.float32)
    mean = np.array(spec.image_mean, dtype=np.float32)[:, None]
    std = np.array(spec.image_std, dtype=np.float32)[:, None]
    return (rescaled - mean) / std


def digest_of(pixels: npt.NDArray[np.uint8], spec: PatchSpec) -> bytes:
    """SHA-256 of resized pixels and of all that turns them into rows.

    The pixel budget is left out: it has done its work in the size of `pixels`.
    """
    cut = (pixels.shape, spec.patch_size, spec.temporal_patch_size, spec.merge_size)
    scale = (spec.image_mean, spec.image_std, spec.rescale_factor)
    digest = hashlib.sha256(repr((cut, scale)).encode())
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.digest()


def _spec_from(defaults: PatchSpec, config: Mapping[str, Any]) -> PatchSpec:
    for key, supported in {
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "resample": 3,
    }.items():
        if config.get(key, supported) != supported:
            raise CheckpointError(f"preprocessor_config.json sets {key} to something that is not supported")
    sizes = replace(
        defaults,
        patch_size=_positive(config, "patch_size", defaults.patch_size),
        temporal_patch_size=_positive(config, "temporal_patch_size", defaults.temporal_patch_size),
        merge_size=_positive(config, "merge_size", defaults.merge_size),
        image_mean=_three_floats(config.get("image_mean", defaults.image_mean)),
        image_std=_three_floats(config.get("image_std", defaults.image_std)),
        rescale_factor=float(config.get("rescale_factor", defaults.rescale_factor)),
    )
    ceiling = DEFAULT_MAX_TOKENS * sizes.factor**2
    size = config.get("size") or {}
    min_pixels = first_limit(config, size, "min_pixels", "shortest_edge", defaults.min_pixels)
    max_pixels = first_limit(config, size, "max_pixels", "longest_edge", ceiling)
    if not 0 < min_pixels <= max_pixels:
        raise CheckpointError(f"preprocessor_config.json has min_pixels {min_pixels}, max_pixels {max_pixels}")
    return replace(sizes, min_pixels=min_pixels, max_pixels=max(min_pixels, min(max_pixels, ceiling)))


def first_limit(config: Mapping[str, Any], size: Mapping[str, Any], name: str, edge: str, default: int) -> int:
    """The three places where releases of transformers keep a pixel limit, the strongest first."""
    found = (config.get(name), size.get(edge), size.get(name))
    return int(next((value for value in found if value is not None), default))


def _positive(config: Mapping[str, Any], name: str, default: int) -> int:
    value = int(config.get(name, default))
    if value < 1:
        raise CheckpointError(f"preprocessor_config.json has {name} {value}")
    return value


def _three_floats(values: Any) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def check_pixels(field: str, value: int | None, low: int) -> None:
    """Raises InputError, naming the field, unless it is None or a whole number from `low` on."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"{field} must be a whole number of pixels, got {value!r}", field)
    if value < low:
        raise InputError(f"{field} must be at least {low}, got {value}", field)
