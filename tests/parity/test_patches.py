"""Sizes and patch rows against transformers, on photographs that scikit-image ships."""

from __future__ import annotations

import io

import numpy as np
import pytest
import skimage
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    Qwen2VLImageProcessorPil,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as hf_smart_resize

from mdi.core.errors import MediaError
from mdi.media import MediaPolicy, PatchSpec, decode_image, image_patches, smart_resize

CHECKPOINT = PatchSpec(max_pixels=12_845_056)
PHOTOGRAPHS = [
    "astronaut",
    "coffee",
    "chelsea",
    "rocket",
    "retina",
    "hubble_deep_field",
    "immunohistochemistry",
]


def photograph(name: str) -> Image.Image:
    return Image.fromarray(getattr(skimage.data, name)())


def oracle(image: Image.Image, spec: PatchSpec) -> tuple[np.ndarray, tuple[int, ...]]:
    processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": spec.min_pixels, "longest_edge": spec.max_pixels},
        patch_size=spec.patch_size,
        temporal_patch_size=spec.temporal_patch_size,
        merge_size=spec.merge_size,
        image_mean=list(spec.image_mean),
        image_std=list(spec.image_std),
    )
    features = processor(images=image, return_tensors="np")
    return features["pixel_values"], tuple(features["image_grid_thw"][0].tolist())


def assert_equal_to_oracle(image: Image.Image, spec: PatchSpec) -> None:
    rows, grid = oracle(image, spec)
    patches = image_patches(image, spec)
    assert patches.grid == grid
    assert patches.rows.dtype == np.float32
    assert patches.rows.flags.c_contiguous
    np.testing.assert_array_max_ulp(patches.rows, rows, maxulp=1)


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_rows_of_a_photograph_equal_transformers(name: str) -> None:
    assert_equal_to_oracle(photograph(name), PatchSpec())


@pytest.mark.parametrize(
    ("width", "height"),
    [
        (1, 1),
        (7, 5),
        (28, 28),
        (29, 41),
        (224, 224),
        (640, 480),
        (333, 1000),
        (2000, 10),
        (30, 5000),
        (1280, 1280),
    ],
)
def test_rows_equal_transformers_at_many_sizes(width: int, height: int) -> None:
    assert_equal_to_oracle(photograph("coffee").resize((width, height)), PatchSpec())


@pytest.mark.parametrize(
    "spec",
    [
        PatchSpec(max_pixels=20_000),
        PatchSpec(min_pixels=800_000),
        CHECKPOINT,
        PatchSpec(
            patch_size=16,
            temporal_patch_size=1,
            merge_size=3,
            image_mean=(0.5, 0.4, 0.3),
            image_std=(0.5,) * 3,
        ),
    ],
)
def test_rows_equal_transformers_under_other_specs(spec: PatchSpec) -> None:
    assert_equal_to_oracle(photograph("chelsea"), spec)


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1"])
def test_rows_of_other_colour_modes_equal_transformers(mode: str) -> None:
    image = photograph("astronaut").convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, "TIFF")
    rows, _ = oracle(image, PatchSpec())
    np.testing.assert_array_equal(image_patches(decode_image(buffer.getvalue(), MediaPolicy()), PatchSpec()).rows, rows)


def test_rows_of_a_jpeg_equal_transformers_from_the_same_bytes() -> None:
    buffer = io.BytesIO()
    photograph("coffee").resize((1500, 1000)).save(buffer, "JPEG", quality=90)
    rows, grid = oracle(Image.open(io.BytesIO(buffer.getvalue())), PatchSpec())
    patches = image_patches(decode_image(buffer.getvalue(), MediaPolicy()), PatchSpec())
    assert patches.grid == grid
    np.testing.assert_array_equal(patches.rows, rows)


@given(
    height=st.integers(1, 20_000),
    width=st.integers(1, 20_000),
    factor=st.sampled_from([14, 28, 32, 56]),
    limits=st.tuples(st.integers(1, 20_000_000), st.integers(1, 20_000_000)).map(sorted),
)
@settings(max_examples=1000, deadline=None)
def test_smart_resize_equals_transformers(height: int, width: int, factor: int, limits: list[int]) -> None:
    try:
        expected = hf_smart_resize(height, width, factor, *limits)
    except ValueError:
        with pytest.raises(MediaError, match="200 times"):
            smart_resize(height, width, factor, *limits)
        return
    assert smart_resize(height, width, factor, *limits) == expected


@given(height=st.integers(1, 8000), width=st.integers(1, 8000))
@settings(max_examples=1000, deadline=None)
def test_smart_resize_equals_transformers_at_the_server_s_limits(height: int, width: int) -> None:
    if max(height, width) <= 200 * min(height, width):
        spec = PatchSpec()
        expected = hf_smart_resize(height, width, 28, spec.min_pixels, spec.max_pixels)
        assert spec.resized(height, width) == expected


def test_a_decoded_png_is_the_photograph_itself() -> None:
    buffer = io.BytesIO()
    photograph("chelsea").save(buffer, "PNG")
    np.testing.assert_array_equal(
        np.asarray(decode_image(buffer.getvalue(), MediaPolicy())), np.asarray(photograph("chelsea"))
    )
