"""Images in, the rows of the vision tower out."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage
from PIL import Image

from mdi.core.errors import CheckpointError, InputError, MediaError
from mdi.media import MediaPolicy, Patches, PatchSpec, decode_image, fetch, image_patches, smart_resize

POLICY = MediaPolicy()

CHECKPOINT_LIMITS = (28, 3136, 12_845_056)


def photograph(width: int = 120, height: int = 80) -> Image.Image:
    return Image.fromarray(skimage.data.coffee()).resize((width, height))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


# Sizes

GOLDEN = {  # height, width -> resized height, resized width
    (224, 224): (224, 224),
    (480, 640): (476, 644),
    (1024, 1024): (1036, 1036),
    (1080, 1920): (1092, 1932),
    (10, 2000): (28, 812),
}

GOLDEN_TOKENS = {
    (224, 224): 64,
    (480, 640): 391,
    (1024, 1024): 1369,
    (1080, 1920): 2691,
    (2160, 3840): 10549,
    (3024, 4032): 15552,
    (10, 2000): 29,
}


@pytest.mark.parametrize("size", GOLDEN)
def test_smart_resize_gives_the_golden_sizes(size: tuple[int, int]) -> None:
    assert smart_resize(*size, *CHECKPOINT_LIMITS) == GOLDEN[size]


@pytest.mark.parametrize("size", GOLDEN_TOKENS)
def test_smart_resize_gives_the_golden_token_counts(size: tuple[int, int]) -> None:
    height, width = smart_resize(*size, *CHECKPOINT_LIMITS)
    assert height * width // 28**2 == GOLDEN_TOKENS[size]


def test_an_aspect_ratio_of_200_is_the_last_one_accepted() -> None:
    assert smart_resize(10, 2000, *CHECKPOINT_LIMITS) == (28, 812)
    with pytest.raises(MediaError, match=r"2001 x 10 pixels .* at most 200 times the other; crop"):
        smart_resize(10, 2001, *CHECKPOINT_LIMITS)


def test_an_image_over_the_pixel_budget_is_resized_to_fit_it() -> None:
    patches = image_patches(photograph(2400, 1600), PatchSpec())
    assert patches.n_tokens <= 1280
    assert patches.rows.shape == (patches.n_tokens * 4, 1176)
    assert image_patches(photograph(2400, 1600), PatchSpec().with_pixels(None, 50_000)).n_tokens <= 50_000 // 784


# Patches


def test_rows_are_in_merge_order_with_the_still_doubled_in_time() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (56, 84, 3), dtype=np.uint8)
    patches = image_patches(Image.fromarray(pixels), PatchSpec())
    assert patches.grid == (1, 4, 6)
    assert patches.n_tokens == 6
    rows = patches.rows.reshape(2, 3, 2, 2, 3, 2, 14, 14)  # token y, x; patch in token y, x; channel; frame; y, x
    mean, std = np.array([PatchSpec().image_mean, PatchSpec().image_std], dtype=np.float32)
    for frame in range(2):
        value = rows[1, 2, 0, 1, :, frame, 3, 5]
        pixel = pixels[1 * 28 + 0 * 14 + 3, 2 * 28 + 1 * 14 + 5]
        np.testing.assert_allclose(value, (pixel / np.float32(255) - mean) / std, rtol=1e-6)


def patches_of(image: Image.Image, **spec: Any) -> Patches:
    return image_patches(image, PatchSpec(**spec))


def test_digests_are_equal_exactly_where_rows_are() -> None:
    image = photograph(560, 280)
    digest = patches_of(image).digest
    assert len(digest) == 32
    assert patches_of(decode_image(encoded(image, "PNG"), POLICY)).digest == digest
    assert patches_of(image, max_pixels=900_000).digest == digest  # the same size comes out
    changed = image.copy()
    changed.putpixel((0, 0), (1, 2, 3))
    others = [
        patches_of(changed),
        patches_of(image, max_pixels=100_000),
        patches_of(image.transpose(Image.Transpose.ROTATE_90)),
        patches_of(image, image_mean=(0.5, 0.5, 0.5)),
        patches_of(image, temporal_patch_size=1),
    ]
    assert len({digest, *(other.digest for other in others)}) == 1 + len(others)


def test_a_path_becomes_rows(tmp_path: Path) -> None:
    photograph(280, 280).save(tmp_path / "cup.png")
    patches = image_patches(decode_image(fetch("cup.png", MediaPolicy(media_dir=tmp_path)), POLICY), PatchSpec())
    assert patches.grid == (1, 20, 20)
    assert patches.rows.shape == (400, 1176)


# The spec

HUB_CONFIG = json.loads("""{
  "min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
  "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
  "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2VLProcessor"
}""")


def test_the_hub_s_preprocessor_config_is_the_default_spec() -> None:
    assert PatchSpec.from_hf(HUB_CONFIG) == PatchSpec()
    assert PatchSpec.from_hf({}) == PatchSpec()
    assert PatchSpec.from_hf({"image_processor": HUB_CONFIG, "processor_class": "x"}) == PatchSpec()


def test_pixel_limits_are_read_from_each_place_they_are_kept() -> None:
    places: list[dict[str, Any]] = [
        {"min_pixels": 5000, "max_pixels": 90_000},
        {"size": {"shortest_edge": 5000, "longest_edge": 90_000}},
        {"size": {"min_pixels": 5000, "max_pixels": 90_000}},
        {"min_pixels": 5000, "max_pixels": 90_000, "size": {"shortest_edge": 1, "longest_edge": 2}},
    ]
    for config in places:
        spec = PatchSpec.from_hf(config)
        assert (spec.min_pixels, spec.max_pixels) == (5000, 90_000)


def test_max_pixels_is_the_smaller_of_the_checkpoint_s_and_1280_tokens() -> None:
    assert PatchSpec.from_hf({"max_pixels": 12_845_056}).max_pixels == 1_003_520
    assert PatchSpec.from_hf({"max_pixels": 500_000}).max_pixels == 500_000
    assert PatchSpec.from_hf({"patch_size": 16, "max_pixels": 10**8}).max_pixels == 1280 * 32 * 32


def test_other_sizes_and_scales_are_read() -> None:
    spec = PatchSpec.from_hf({"patch_size": 16, "merge_size": 1, "image_mean": [0.5] * 3, "image_std": [0.25] * 3})
    assert (spec.patch_size, spec.factor) == (16, 16)
    assert (spec.image_mean, spec.image_std) == ((0.5,) * 3, (0.25,) * 3)


@pytest.mark.parametrize(
    "config",
    [
        {"patch_size": 0},
        {"patch_size": "big"},
        {"min_pixels": 10, "max_pixels": 5},
        {"image_mean": [0.5]},
        {"image_mean": "0.5"},
        {"size": 224},
        {"do_normalize": "no"},
        {"do_resize": False},
        {"resample": 2},
    ],
)
def test_a_preprocessor_config_that_cannot_be_followed_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json"):
        PatchSpec.from_hf(config)


def test_a_request_may_set_its_pixel_budget() -> None:
    spec = PatchSpec().with_pixels(10_000, 2_000_000)
    assert (spec.min_pixels, spec.max_pixels) == (10_000, 2_000_000)
    assert PatchSpec().with_pixels(None, None) == PatchSpec()
    assert PatchSpec().with_pixels(None, 50_000).min_pixels == 3136


@pytest.mark.parametrize(
    ("min_pixels", "max_pixels", "field"),
    [
        (0, None, "min_pixels"),
        (-1, None, "min_pixels"),
        (None, 0, "max_pixels"),
        (None, 783, "max_pixels"),
        (None, 1000, "max_pixels"),
        (2_000_000, None, "min_pixels"),
        (20_000, 10_000, "max_pixels"),
        (True, None, "min_pixels"),
        (None, 1e6, "max_pixels"),
        ("5", None, "min_pixels"),
    ],
)
def test_an_impossible_pixel_budget_is_refused_by_field(min_pixels: Any, max_pixels: Any, field: str) -> None:
    with pytest.raises(InputError, match=field) as caught:
        PatchSpec().with_pixels(min_pixels, max_pixels)
    assert caught.value.field == field
