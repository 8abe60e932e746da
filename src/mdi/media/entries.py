"""The entries of a checkpoint's image and video settings that are used, with the defaults of transformers' classes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from mdi.core.entries import Entries

Cells = Annotated[int, Field(ge=1, le=1024)]
Pixels = Annotated[int, Field(ge=1, le=2**40)]
Number = Annotated[float, Field(ge=-1e6, le=1e6)]
Divisor = Annotated[float, Field(ge=1e-6, le=1e6)]
CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]

one_for_all = BeforeValidator(lambda value: [value] * 3 if isinstance(value, (int, float)) else value)
Means = Annotated[list[Number], Field(min_length=3, max_length=3), one_for_all]
Deviations = Annotated[list[Divisor], Field(min_length=3, max_length=3), one_for_all]


class SizeEntries(Entries):
    """Limits on the area of a picture; min_pixels and max_pixels: the older names."""

    shortest_edge: Pixels | None = None
    longest_edge: Pixels | None = None
    min_pixels: Pixels | None = None
    max_pixels: Pixels | None = None


class PictureEntries(Entries):
    """How pictures are resized, scaled and cut. One number for mean or std is that of all channels."""

    do_resize: Literal[True] = True
    do_convert_rgb: Literal[True] = True
    do_rescale: bool | None = True
    do_normalize: bool | None = True
    resample: Literal[3] = 3  # bicubic
    size: SizeEntries | None = None
    min_pixels: Pixels | None = None
    max_pixels: Pixels | None = None
    patch_size: Cells = 14
    temporal_patch_size: Cells = 2
    merge_size: Cells = 2
    rescale_factor: Divisor = 1 / 255
    image_mean: Means = CLIP_MEAN
    image_std: Deviations = CLIP_STD

    @property
    def pixel_limits(self) -> tuple[int | None, int | None]:
        """The smallest and the largest area, from the strongest of the three places where releases keep them."""
        size = self.size or SizeEntries()
        least = (self.min_pixels, size.shortest_edge, size.min_pixels)
        most = (self.max_pixels, size.longest_edge, size.max_pixels)
        return _first(least), _first(most)


class VideoEntries(PictureEntries):
    """How many frames of a video are taken, beside what is said of pictures."""

    fps: Annotated[float, Field(gt=0, le=1e6)] | None = None
    min_frames: Annotated[int, Field(ge=1, le=2**24)] | None = None
    max_frames: Annotated[int, Field(ge=1, le=2**24)] | None = None


def _first(values: tuple[int | None, ...]) -> int | None:
    return next((value for value in values if value is not None), None)
