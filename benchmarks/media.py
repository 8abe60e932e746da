"""Times a 12-megapixel JPEG to patch rows, ours and transformers' Qwen2VLImageProcessorPil, alternating.

    python -m benchmarks.media --runs 15

A ratio above 1 means that ours is faster.
"""

from __future__ import annotations

import argparse
import io
import statistics
import time
from collections.abc import Callable

import numpy as np
import skimage
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mdi.media import MediaPolicy, PatchSpec, decode_image, image_patches

CHECKPOINT_MAX_PIXELS = 12_845_056


def photograph(width: int, height: int) -> bytes:
    """A JPEG: a photograph scaled up, with some sensor noise to make it as hard to decode as a camera's."""
    image = Image.fromarray(skimage.data.coffee()).resize((width, height), Image.Resampling.BICUBIC)
    noise = np.random.default_rng(0).integers(-6, 7, (height, width, 1), dtype=np.int16)
    pixels = np.clip(np.asarray(image).astype(np.int16) + noise, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compare(data: bytes, max_pixels: int, runs: int) -> None:
    spec = PatchSpec().with_pixels(None, max_pixels)
    policy = MediaPolicy()
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": spec.min_pixels, "longest_edge": spec.max_pixels})

    def ours() -> np.ndarray:
        return image_patches(decode_image(data, policy), spec).rows

    def theirs() -> np.ndarray:
        rows: np.ndarray = processor(images=Image.open(io.BytesIO(data)), return_tensors="np")["pixel_values"]
        return rows

    difference = float(np.abs(ours() - theirs()).max())
    times = [(seconds(ours), seconds(theirs)) for _ in range(runs)]
    mine, other = zip(*times, strict=True)
    print(f"max_pixels {max_pixels:,}: largest difference {difference:g}")
    for name, pick in (("min", min), ("median", statistics.median)):
        print(
            f"  {name:6}  ours {pick(mine) * 1e3:6.1f} ms   transformers {pick(other) * 1e3:6.1f} ms   "
            f"ratio {pick(other) / pick(mine):.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=9)
    runs = parser.parse_args().runs
    data = photograph(3024, 4032)
    print(f"3024 x 4032 JPEG, {len(data) / 2**20:.1f} MiB, {runs} runs each")
    for max_pixels in (PatchSpec().max_pixels, CHECKPOINT_MAX_PIXELS):
        compare(data, max_pixels, runs)


if __name__ == "__main__":
    main()
