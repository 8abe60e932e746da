"""Qwen3-VL against transformers: tower, deepstack, interleaved positions, videos, logits and greedy tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from mdi.layers.rope import Grid
from tests.parity import test_model
from tests.parity.conftest import IMAGE, VIDEO, VISION_END, VISION_START, load_stages
from tests.parity.test_model import encode, greedy_tokens, logits_of, random_rows, relative_difference

PATCH_ELEMENTS = 3 * 2 * 16 * 16
N_LAYERS = 4
TEXT = list(range(1, 40))
TIMES = ([60, 48, 46, 51, 62], [60, 49, 46, 51, 62], [60, 50, 62])
GRIDS: list[Grid] = [(1, 8, 8), (1, 20, 12), (1, 4, 30), (3, 10, 14), (1, 2, 2), (2, 16, 8), (1, 40, 42)]


class Prompt(test_model.Prompt):
    """A video is given as its frames: each an image behind its time, with the placeholders of videos."""

    def __init__(self, *pieces: Sequence[int] | Grid, videos: Sequence[Grid] = (), seed: int = 0) -> None:
        """videos: grids of the pieces before whose frames they are split into, and their number of frames."""
        self.videos = list(videos)
        super().__init__(*pieces, seed=seed, patch_elements=PATCH_ELEMENTS)
        for token, span in zip(self.kinds, self.spans, strict=True):
            self.ids[span.start : span.start + span.length] = [token] * span.length

    @property
    def kinds(self) -> list[int]:
        """The placeholder of each span: the last frames are those of the videos."""
        frames = sum(grid[0] for grid in self.videos)
        return [IMAGE] * (len(self.spans) - frames) + [VIDEO] * frames

    def oracle_inputs(self) -> dict[str, Any]:
        ids = torch.tensor([self.ids])
        inputs: dict[str, Any] = {
            "input_ids": ids,
            "mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int(),
        }
        images = [index for index, kind in enumerate(self.kinds) if kind == IMAGE]
        if images:
            inputs["pixel_values"] = torch.cat([self.rows[index] for index in images])
            inputs["image_grid_thw"] = torch.tensor([self.spans[index].grid for index in images])
        if self.videos:
            inputs["pixel_values_videos"] = torch.cat(self.rows[len(images) :])
            inputs["video_grid_thw"] = torch.tensor(self.videos)
        return inputs


def frames(grid: Grid) -> list[Sequence[int] | Grid]:
    """The pieces that a video becomes."""
    return [piece for time in TIMES[: grid[0]] for piece in (time, (1, *grid[1:]))]


CLIP: Grid = (3, 8, 6)
PROMPTS = {
    "text": Prompt(TEXT),
    "an image": Prompt(TEXT[:5], (1, 20, 12), TEXT[:9]),
    "image first": Prompt((1, 4, 4), TEXT[:3]),
    "three images": Prompt((1, 8, 8), TEXT[:3], (1, 4, 30), (1, 6, 10), TEXT[:7]),
    "a video": Prompt(TEXT[:5], *frames(CLIP), TEXT[:9], videos=[CLIP]),
    "image and video": Prompt(TEXT[:2], (1, 8, 8), TEXT[:5], *frames((2, 4, 6)), TEXT[:9], videos=[(2, 4, 6)]),
}
CUTS = [(), (1,), (2,), (1, 2, 3)]


@pytest.fixture(scope="module")
def oracle() -> Qwen3VLForConditionalGeneration:
    return small_model()


def small_model(seed: int = 0, **text: Any) -> Qwen3VLForConditionalGeneration:
    torch.manual_seed(seed)
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": 256,
            "bos_token_id": None,
            "eos_token_id": None,
            "hidden_size": 96,
            "intermediate_size": 160,
            "num_hidden_layers": N_LAYERS,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_interleaved": True,
                "mrope_section": [6, 5, 5],
            },
            "initializer_range": 0.2,
            **text,
        },
        vision_config={
            "depth": 5,
            "hidden_size": 144,
            "intermediate_size": 208,
            "num_heads": 2,
            "out_hidden_size": 96,
            "num_position_embeddings": 144,
            "deepstack_visual_indexes": [0, 2, 3],
            "initializer_range": 0.1,
        },
        tie_word_embeddings=True,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )
    model = Qwen3VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture(scope="module")
def checkpoint(oracle: Qwen3VLForConditionalGeneration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen3-vl")
    oracle.save_pretrained(path)
    return path


@pytest.mark.parametrize("grid", GRIDS)
def test_the_tower_gives_the_numbers_of_transformers(
    grid: Grid, oracle: Qwen3VLForConditionalGeneration, checkpoint: Path
) -> None:
    [stage] = load_stages(checkpoint)
    rows = random_rows(grid, patch_elements=PATCH_ELEMENTS)
    with torch.no_grad():
        theirs = oracle.model.visual(rows, grid_thw=torch.tensor([grid]))
    embeddings, *features = encode(stage, rows, grid).split(96, dim=1)
    assert relative_difference(embeddings, theirs.pooler_output) < 1e-4
    for ours, expected in zip(features, theirs.deepstack_features, strict=True):
        assert relative_difference(ours, expected) < 1e-4


def test_a_video_is_its_frames(checkpoint: Path) -> None:
    """Which is why they are encoded, and kept, one by one."""
    [stage] = load_stages(checkpoint)
    rows = random_rows(CLIP, patch_elements=PATCH_ELEMENTS)
    frame: Grid = (1, *CLIP[1:])
    one_by_one = [encode(stage, part, frame) for part in rows.chunk(CLIP[0])]
    assert torch.equal(encode(stage, rows, CLIP), torch.cat(one_by_one))


@pytest.mark.parametrize("name", PROMPTS)
def test_positions_equal_those_of_transformers(name: str, oracle: Qwen3VLForConditionalGeneration) -> None:
    prompt = PROMPTS[name]
    inputs = prompt.oracle_inputs()
    grids = {f"{kind}_grid_thw": inputs.get(f"{kind}_grid_thw") for kind in ("image", "video")}
    theirs, delta = oracle.model.get_rope_index(inputs["input_ids"], inputs["mm_token_type_ids"], **grids)
    assert torch.equal(prompt.positions, theirs[:, 0])
    assert prompt.delta == int(delta)


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("name", PROMPTS)
def test_logits_are_those_of_transformers(
    name: str, cuts: tuple[int, ...], oracle: Qwen3VLForConditionalGeneration, checkpoint: Path
) -> None:
    prompt = PROMPTS[name]
    with torch.no_grad():
        theirs = oracle(**prompt.oracle_inputs(), use_cache=False).logits[0]
    assert relative_difference(logits_of(load_stages(checkpoint, *cuts), prompt), theirs) < 1e-4


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_a_chunked_prefill_cuts_images_in_two(
    chunk: int, oracle: Qwen3VLForConditionalGeneration, checkpoint: Path
) -> None:
    prompt = PROMPTS["image and video"]
    with torch.no_grad():
        theirs = oracle(**prompt.oracle_inputs(), use_cache=False).logits[0]
    assert relative_difference(logits_of(load_stages(checkpoint, 1, 2), prompt, chunk), theirs) < 1e-4


@pytest.mark.parametrize("cuts", CUTS)
def test_greedy_tokens_are_those_of_transformers_in_a_mixed_batch(
    cuts: tuple[int, ...], oracle: Qwen3VLForConditionalGeneration, checkpoint: Path
) -> None:
    with torch.no_grad():
        theirs = [
            oracle.generate(**prompt.oracle_inputs(), max_new_tokens=10, do_sample=False, eos_token_id=None)[
                0, len(prompt.ids) :
            ].tolist()
            for prompt in PROMPTS.values()
        ]
    assert greedy_tokens(load_stages(checkpoint, *cuts), list(PROMPTS.values()), 10) == theirs
