"""Videos against transformers: patch rows from its image processor, logits and tokens from its model.

Its video processor needs torchvision and its video positions are wrong since release 5, so both are written down here.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import skimage
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from testing.videos import LOSSLESS, encoded
from torch import Tensor
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mdi import Engine, SamplingParams
from mdi.core.batch import Batch, Slice, Visual
from mdi.media import MediaPolicy, PatchSpec, VideoSpec, open_video
from mdi.models.registry import read_config
from mdi.models.stage import Stage
from mdi.prompt.assembly import Prompt
from mdi.prompt.builder import PromptBuilder
from mdi.prompt.tokenizer import Tokenizer
from tests.parity.conftest import load_stages, qwen2_vl_config
from tests.parity.test_model import encode, relative_difference

POLICY = MediaPolicy(any_file=True)
SPEC = VideoSpec(min_pixels=28 * 28, max_pixels=8 * 28 * 28)
CUT = PatchSpec(min_pixels=28 * 28, max_pixels=8 * 28 * 28)


def photographs(size: tuple[int, int] = (120, 90)) -> list[Image.Image]:
    names = ("coffee", "astronaut", "chelsea", "rocket", "hubble_deep_field", "retina")
    return [Image.fromarray(getattr(skimage.data, name)()).resize(size) for name in names]


def rows_of_transformers(frames: list[Image.Image], spec: VideoSpec) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Two frames of a patch are one layer each of the two stills' patches."""
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": spec.min_pixels, "longest_edge": spec.max_pixels})
    features = [processor(images=frame, return_tensors="np") for frame in frames]
    stills = [feature["pixel_values"].reshape(-1, 3, 2, 196) for feature in features]
    pairs = zip(stills[::2], stills[1::2], strict=True)
    rows = [np.stack([first[:, :, 0], second[:, :, 1]], axis=2).reshape(-1, 1176) for first, second in pairs]
    _, height, width = features[0]["image_grid_thw"][0].tolist()
    return np.concatenate(rows), (len(frames) // 2, height, width)


@pytest.mark.parametrize("size", [(120, 90), (64, 64), (500, 140), (33, 200)])
def test_rows_of_a_video_equal_those_of_its_frames_in_transformers(size: tuple[int, int]) -> None:
    frames = photographs(size)
    rows, grid = rows_of_transformers(frames, SPEC)
    patches = open_video(encoded(frames, *LOSSLESS), POLICY, SPEC.with_options(fps=10), CUT).patches()
    assert patches.grid == grid
    np.testing.assert_array_max_ulp(patches.rows, rows, maxulp=1)


@settings(max_examples=500, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 384))
def test_frames_are_those_of_torch_linspace(total_frames: int, pairs: int) -> None:
    theirs = torch.linspace(0, total_frames - 1, 2 * pairs).round().long()  # as in qwen_vl_utils
    assert SPEC.frame_indices(total_frames, 2 * pairs) == theirs.tolist()


@pytest.fixture(scope="module")
def oracle() -> Qwen2VLForConditionalGeneration:
    """As large as the tiny checkpoint's tokenizer needs it."""
    torch.manual_seed(3)
    config = qwen2_vl_config(vocab_size=272)
    config.image_token_id, config.video_token_id = 262, 263
    config.vision_start_token_id, config.vision_end_token_id = 259, 260
    return Qwen2VLForConditionalGeneration(config).eval()


@pytest.fixture(scope="module")
def checkpoint(
    oracle: Qwen2VLForConditionalGeneration, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("video") / "model"
    oracle.save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        shutil.copy(tiny_checkpoint / name, path)
    (path / "video_preprocessor_config.json").write_text(
        f'{{"min_pixels": {SPEC.min_pixels}, "max_pixels": {SPEC.max_pixels}}}'
    )
    return path


def conversation() -> tuple[list[dict[str, Any]], list[tuple[str, list[Image.Image]]]]:
    """A prompt with a video, an image and another video between texts, and what it holds, in order."""
    first, still, second = photographs(), photographs((80, 60))[0], photographs((60, 120))[:3]
    image = encoded([still], "image2pipe", "png", "rgb24")
    parts = [
        {"type": "text", "text": "First:"},
        {"type": "video", "video": encoded(first, *LOSSLESS), "fps": 10},
        {"type": "image", "image": image, "max_pixels": CUT.max_pixels, "min_pixels": CUT.min_pixels},
        {"type": "text", "text": "then"},
        {"type": "video", "video": [encoded([frame], "image2pipe", "png", "rgb24") for frame in second]},
        {"type": "text", "text": "What changed?"},
    ]
    held = [("video", first), ("image", [still, still]), ("video", [*second, second[-1]])]
    return [{"role": "user", "content": parts}], held


def their_inputs(path: Path) -> dict[str, Any]:
    """Ids, rows and positions as transformers 4 has them for `conversation`."""
    messages, held = conversation()
    tokenizer = AutoTokenizer.from_pretrained(path)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    rows: dict[str, list[Tensor]] = {"image": [], "video": []}
    grids: dict[str, list[tuple[int, int, int]]] = {"image": [], "video": []}
    for kind, frames in held:
        values, grid = rows_of_transformers(frames, SPEC)
        rows[kind].append(torch.from_numpy(values))
        grids[kind].append(grid)
        text = text.replace(f"<|{kind}_pad|>", f"<{kind}>" * (grid[0] * grid[1] * grid[2] // 4), 1)
    text = text.replace("<image>", "<|image_pad|>").replace("<video>", "<|video_pad|>")
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    return {
        "input_ids": ids,
        "pixel_values": torch.cat(rows["image"]),
        "image_grid_thw": torch.tensor(grids["image"]),
        "pixel_values_videos": torch.cat(rows["video"]),
        "video_grid_thw": torch.tensor(grids["video"]),
        "mm_token_type_ids": (ids == 262).int() + 2 * (ids == 263).int(),
        "position_ids": positions_of_transformers_4(ids[0].tolist(), {262: grids["image"], 263: grids["video"]}),
    }


def positions_of_transformers_4(ids: list[int], grids: dict[int, list[tuple[int, int, int]]]) -> Tensor:
    """`get_rope_index` of release 4, token by token: int64 [3, 1, tokens]."""
    positions: list[tuple[int, int, int]] = []
    left = {token: iter(found) for token, found in grids.items()}
    index = 0
    while index < len(ids):
        start = max(map(max, positions)) + 1 if positions else 0
        if ids[index] not in left:
            positions.append((start, start, start))
            index += 1
            continue
        frames, height, width = next(left[ids[index]])
        cells = [(t, h, w) for t in range(frames) for h in range(height // 2) for w in range(width // 2)]
        positions += [(start + t, start + h, start + w) for t, h, w in cells]
        index += len(cells)
    return torch.tensor(positions).T[:, None]


def our_prompt(path: Path) -> Prompt:
    config = read_config(json.loads((path / "config.json").read_text()))
    return PromptBuilder(config, Tokenizer(path), PatchSpec(), POLICY, 1024, SPEC).build(conversation()[0])


def our_logits(stage: Stage, prompt: Prompt) -> Tensor:
    visuals = [
        Visual(media.span.start, encode(stage, torch.from_numpy(media.patches.rows), media.patches.grid))
        for media in prompt.media
    ]
    hidden = stage.embed(torch.tensor(prompt.token_ids), visuals)
    return stage.logits(Batch(0, (Slice(0, 0, len(prompt.token_ids)),), prompt.positions), hidden)


def test_a_prompt_of_videos_and_images_equals_that_of_transformers(checkpoint: Path) -> None:
    prompt, theirs = our_prompt(checkpoint), their_inputs(checkpoint)
    assert list(prompt.token_ids) == theirs["input_ids"][0].tolist()
    assert torch.equal(prompt.positions, theirs["position_ids"][:, 0])
    videos = torch.cat([torch.from_numpy(prompt.media[index].patches.rows) for index in (0, 2)])
    torch.testing.assert_close(videos, theirs["pixel_values_videos"], rtol=1e-6, atol=1e-6)


def test_its_logits_and_greedy_tokens_equal_those_of_transformers(
    oracle: Qwen2VLForConditionalGeneration, checkpoint: Path
) -> None:
    inputs = their_inputs(checkpoint)
    with torch.no_grad():
        theirs = oracle(**inputs, use_cache=False).logits[0]
    [stage] = load_stages(checkpoint)
    assert relative_difference(our_logits(stage, our_prompt(checkpoint)), theirs) < 1e-4
    with Engine(checkpoint, n_nodes=2, sequence_length=1024) as engine:
        ours = engine.chat(conversation()[0], SamplingParams(temperature=0, max_tokens=8)).token_ids
    assert ours
    assert list(ours) == their_greedy_tokens(oracle, inputs, len(ours))


@torch.no_grad()
def their_greedy_tokens(oracle: Qwen2VLForConditionalGeneration, inputs: dict[str, Any], n_tokens: int) -> list[int]:
    """Without a cache, so that every position is the one handed over."""
    inputs = dict(inputs)
    n_prompt = inputs["input_ids"].shape[1]
    for _ in range(n_tokens):
        token = oracle(**inputs, use_cache=False).logits[:, -1:].argmax(-1)
        inputs["input_ids"] = torch.cat((inputs["input_ids"], token), 1)
        inputs["mm_token_type_ids"] = torch.cat((inputs["mm_token_type_ids"], torch.zeros_like(token)), 1)
        following = inputs["position_ids"].max() + 1
        inputs["position_ids"] = torch.cat((inputs["position_ids"], following.expand(3, 1, 1)), 2)
    return cast(list[int], inputs["input_ids"][0, n_prompt:].tolist())
