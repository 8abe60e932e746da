"""Qwen3-VL against transformers: tower, deepstack, interleaved positions, videos, logits and greedy tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import skimage
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor, smart_resize
from transformers.video_utils import VideoMetadata

from mdi.core.errors import CheckpointError
from mdi.layers.rope import Grid
from mdi.media import PatchSpec, TimedVideoSpec, image_patches
from mdi.media.video import middle_times
from mdi.models.registry import read_config
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
    embeddings, *features = torch.split(encode(stage, rows, grid), 96, dim=1)
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


@pytest.mark.parametrize("cuts", [(), (1, 2, 3)])
def test_without_kernels_logits_are_the_same(
    cuts: tuple[int, ...],
    oracle: Qwen3VLForConditionalGeneration,
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mdi.layers.linear.library", lambda: None)
    prompt = PROMPTS["image and video"]
    with torch.no_grad():
        theirs = oracle(**prompt.oracle_inputs(), use_cache=False).logits[0]
    assert relative_difference(logits_of(load_stages(checkpoint, *cuts), prompt), theirs) < 1e-4


def test_bfloat16_stays_close_to_transformers_in_bfloat16(tmp_path: Path) -> None:
    oracle = small_model(seed=2, initializer_range=0.06).to(torch.bfloat16)
    oracle.save_pretrained(tmp_path)
    exact_model = Qwen3VLForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).eval()
    stages = load_stages(tmp_path, 1, 3, dtype=torch.bfloat16)
    for prompt in PROMPTS.values():
        inputs = prompt.oracle_inputs()
        with torch.no_grad():
            exact = exact_model(**inputs, use_cache=False).logits[0]
            floats = {name: value.bfloat16() for name, value in inputs.items() if name.startswith("pixel_values")}
            theirs = oracle(**inputs | floats, use_cache=False).logits[0].float()
        ours = logits_of(stages, prompt).float()
        assert torch.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.999
        assert (ours - exact).norm() < 1.1 * (theirs - exact).norm()  # no further from the truth than the reference


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("vision_config", {"hidden_act": "gelu"}, "activation 'gelu' is not supported in the vision tower"),
        ("vision_config", {"hidden_size": 146}, "hidden_size 146 is not a multiple of 4 x num_heads"),
        ("vision_config", {"in_channels": 1}, "in_channels is 1, but pictures have 3"),
        ("vision_config", {"out_hidden_size": 64}, "the tower's output .* has 64 numbers, the decoder 96"),
        ("vision_config", {"num_position_embeddings": 143}, "num_position_embeddings 143 is not a square"),
        ("vision_config", {"deepstack_visual_indexes": [0, 5]}, r"is \[0, 5\], but the tower has blocks 0 to 4"),
        ("vision_config", {"deepstack_visual_indexes": [2, 1]}, r"is \[2, 1\]: rising numbers are expected"),
        ("vision_config", {"deepstack_visual_indexes": [-1]}, "greater than or equal to 0"),
        ("vision_config", {"deepstack_visual_indexes": [0, 1, 2, 3, 4]}, "has 5 entries for the first .* there are 4"),
        ("text_config", {"rope_parameters": {"mrope_section": [6, 5, 4]}}, "add up to half of the head's 32 channels"),
        ("text_config", {"rope_parameters": {"mrope_section": [4, 6, 6]}}, r"\[4, 6, 6\]: of 16 interleaved channels"),
    ],
)
def test_a_wrong_model_is_refused_by_name(
    part: str, changes: dict[str, Any], message: str, oracle: Qwen3VLForConditionalGeneration
) -> None:
    config = oracle.config.to_dict()
    config["architectures"] = ["Qwen3VLForConditionalGeneration"]
    config[part] |= changes
    with pytest.raises(CheckpointError, match=message):
        read_config(config)


def test_frames_need_their_marks(oracle: Qwen3VLForConditionalGeneration) -> None:
    config = oracle.config.to_dict()
    config["architectures"] = ["Qwen3VLForConditionalGeneration"]
    with pytest.raises(CheckpointError, match="vision_start_token_id and vision_end_token_id are needed"):
        read_config(config | {"vision_end_token_id": None})


def test_the_dtype_may_stand_in_the_decoders_part_alone(oracle: Qwen3VLForConditionalGeneration) -> None:
    """As on the hub."""
    config = oracle.config.to_dict()
    config["architectures"] = ["Qwen3VLForConditionalGeneration"]
    del config["dtype"]
    config["text_config"]["dtype"] = "bfloat16"
    assert read_config(config).dtype == "bfloat16"


# Pictures and frames


@pytest.mark.parametrize("size", [(120, 90), (640, 480), (500, 140), (33, 900), (2000, 1500)])
def test_images_are_cut_as_transformers_cuts_them(size: tuple[int, int]) -> None:
    image = Image.fromarray(skimage.data.astronaut()).resize(size)
    limits = {"shortest_edge": 65536, "longest_edge": 1280 * 32 * 32}
    entries = {"size": limits, "patch_size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    theirs = Qwen2VLImageProcessorPil(**entries)(images=image, return_tensors="np")
    ours = image_patches(image, PatchSpec.from_hf(entries))
    assert ours.grid == tuple(theirs["image_grid_thw"][0])
    np.testing.assert_array_max_ulp(ours.rows, theirs["pixel_values"], maxulp=1)


VIDEO_SPEC = TimedVideoSpec.from_hf({"size": {"shortest_edge": 4096, "longest_edge": 25165824}})


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 5000), st.sampled_from([1.0, 9.0, 15.0, 24.0, 25.0, 29.97, 60.0]), st.sampled_from([2, 1, 4, 0.5])
)
def test_frames_and_their_times_are_those_of_transformers(total_frames: int, fps: float, rate: float) -> None:
    metadata = VideoMetadata(total_num_frames=total_frames, fps=fps)
    limits = SimpleNamespace(fps=2, min_frames=4, max_frames=768)  # the class itself needs torchvision
    theirs = Qwen3VLVideoProcessor.sample_frames(limits, metadata, fps=rate)
    spec = VIDEO_SPEC.with_options(fps=rate)
    indices = spec.frame_indices(total_frames, spec.frame_count(total_frames, fps))
    assert indices == theirs.tolist()
    times_s = middle_times([index / fps for index in indices], 2)
    assert list(times_s) == Qwen3VLProcessor._calculate_timestamps(None, theirs, fps, 2)


@settings(max_examples=500, deadline=None)
@given(
    st.integers(2, 768),
    st.integers(16, 2500),
    st.integers(16, 2500),
    st.sampled_from([(4096, 25165824), (131072, 786432), (1024, 65536)]),
)
def test_frames_are_as_large_as_in_transformers(n_frames: int, height: int, width: int, size: tuple[int, int]) -> None:
    """With its cap, which is that of qwen-vl-utils and is to become its default."""
    least, most = size
    a_frame = max(min(768 * 32 * 32, most // n_frames), int(least * 1.05))  # Qwen3VLVideoProcessor.resize
    theirs = smart_resize(n_frames, height, width, 2, 32, least, a_frame * n_frames)
    spec = TimedVideoSpec.from_hf({"size": {"shortest_edge": least, "longest_edge": most}})
    assert spec.resized(height, width, n_frames, 32) == theirs


def test_limits_of_videos_that_contradict_each_other_are_refused() -> None:
    for wrong in ({"size": {"shortest_edge": 9, "longest_edge": 8}}, {"min_frames": 9, "max_frames": 8}):
        with pytest.raises(CheckpointError, match="the limits contradict each other"):
            TimedVideoSpec.from_hf(wrong)
