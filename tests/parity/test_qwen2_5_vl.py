"""Qwen2.5-VL against transformers: the windowed tower, positions by seconds, logits and greedy tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from mdi.core.errors import CheckpointError
from mdi.layers.rope import Grid, MediaSpan, prompt_positions
from mdi.models.qwen2_5_vl import windows
from mdi.models.registry import read_config
from tests.parity.conftest import IMAGE, VIDEO, VISION_END, VISION_START, load_stages
from tests.parity.test_model import Prompt, encode, greedy_tokens, logits_of, random_rows, relative_difference

TEXT = list(range(1, 40))
GRIDS: list[Grid] = [(1, 8, 8), (1, 20, 12), (1, 4, 30), (3, 10, 14), (1, 2, 2), (2, 16, 8)]


@pytest.fixture(scope="module")
def oracle() -> Qwen2_5_VLForConditionalGeneration:
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 256,
            "bos_token_id": None,
            "eos_token_id": None,
            "hidden_size": 96,
            "intermediate_size": 160,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
            "tie_word_embeddings": True,
            "initializer_range": 0.2,
        },
        vision_config={
            "depth": 4,
            "hidden_size": 80,
            "intermediate_size": 108,
            "num_heads": 2,
            "out_hidden_size": 96,
            "fullatt_block_indexes": [1, 3],
            "tokens_per_second": 4,
            "initializer_range": 0.1,
        },
        tie_word_embeddings=True,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name or "ln_q" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture(scope="module")
def checkpoint(oracle: Qwen2_5_VLForConditionalGeneration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen2-5-vl")
    oracle.save_pretrained(path)
    return path


@pytest.mark.parametrize("grid", GRIDS)
def test_the_tower_gives_the_numbers_of_transformers(
    grid: Grid, oracle: Qwen2_5_VLForConditionalGeneration, checkpoint: Path
) -> None:
    [stage] = load_stages(checkpoint)
    rows = random_rows(grid)
    with torch.no_grad():
        theirs = oracle.model.visual(rows, grid_thw=torch.tensor([grid])).pooler_output
    assert relative_difference(encode(stage, rows, grid), theirs) < 1e-4


@pytest.mark.parametrize("grid", GRIDS)
def test_windows_hold_every_token_once(grid: Grid) -> None:
    order, sizes = windows(grid, 2, 4)
    frames, rows, columns = grid
    assert sorted(order.tolist()) == list(range(frames * rows * columns // 4))
    assert sum(sizes) == frames * rows * columns
    assert max(sizes) <= 64


PROMPTS = {
    "text": Prompt(TEXT),
    "an image": Prompt(TEXT[:5], (1, 20, 12), TEXT[:9]),
    "three images": Prompt((1, 8, 8), TEXT[:3], (1, 4, 30), (1, 6, 10), TEXT[:7]),
}


@pytest.mark.parametrize("cuts", [(), (1,), (1, 3)])
@pytest.mark.parametrize("name", PROMPTS)
def test_logits_are_those_of_transformers(
    name: str, cuts: tuple[int, ...], oracle: Qwen2_5_VLForConditionalGeneration, checkpoint: Path
) -> None:
    prompt = PROMPTS[name]
    with torch.no_grad():
        theirs = oracle(**prompt.oracle_inputs(), use_cache=False).logits[0]
    assert relative_difference(logits_of(load_stages(checkpoint, *cuts), prompt), theirs) < 1e-4


@pytest.mark.parametrize("cuts", [(), (1, 3)])
def test_greedy_tokens_are_those_of_transformers_in_a_mixed_batch(
    cuts: tuple[int, ...], oracle: Qwen2_5_VLForConditionalGeneration, checkpoint: Path
) -> None:
    with torch.no_grad():
        theirs = [
            oracle.generate(**prompt.oracle_inputs(), max_new_tokens=10, do_sample=False, eos_token_id=None)[
                0, len(prompt.ids) :
            ].tolist()
            for prompt in PROMPTS.values()
        ]
    assert greedy_tokens(load_stages(checkpoint, *cuts), list(PROMPTS.values()), 10) == theirs


@pytest.mark.parametrize("seconds", [1.0, 0.5, 1.3, 0.1])
def test_frames_stand_apart_by_their_seconds(seconds: float, oracle: Qwen2_5_VLForConditionalGeneration) -> None:
    """As in transformers; after a video the text goes on behind its highest position, as in transformers 4."""
    grid = (3, 4, 6)
    prompt = Prompt(TEXT[:4], grid, TEXT[:6])
    [span] = prompt.spans
    ours, delta = prompt_positions(len(prompt.ids), [MediaSpan(span.start, grid, 2, 4 * seconds)])
    inputs = prompt.oracle_inputs()
    theirs, _ = oracle.model.get_rope_index(
        inputs["input_ids"],
        inputs["mm_token_type_ids"],
        video_grid_thw=inputs["video_grid_thw"],
        second_per_grid_ts=torch.tensor([seconds]),
    )
    end = span.start + span.length
    frames = [int(frame * 4 * seconds) for frame in range(3)]
    assert ours[0, span.start : end].tolist() == [span.start + frame for frame in frames for _ in range(6)]
    assert torch.equal(ours[1:, :end], theirs[1:, 0, :end])
    highest = int(ours[:, :end].max())
    assert ours[:, end:].tolist() == [list(range(highest + 1, highest + 1 + len(prompt.ids) - end))] * 3
    assert delta == highest + 1 - end


def test_a_video_gives_the_logits_of_transformers_at_the_same_positions(
    oracle: Qwen2_5_VLForConditionalGeneration, checkpoint: Path
) -> None:
    prompt = Prompt(TEXT[:5], (3, 8, 10), TEXT[:9])
    [span] = prompt.spans
    prompt.positions, prompt.delta = prompt_positions(len(prompt.ids), [MediaSpan(span.start, span.grid, 2, 2.6)])
    with torch.no_grad():
        theirs = oracle(**prompt.oracle_inputs(), position_ids=prompt.positions[:, None], use_cache=False).logits[0]
    assert relative_difference(logits_of(load_stages(checkpoint, 2), prompt), theirs) < 1e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "activation 'gelu' is not supported in the vision tower"),
        ({"window_size": 14}, "window_size 14 is smaller than a token"),
        ({"hidden_size": 82}, "hidden_size 82 is not a multiple of 4 x num_heads"),
        ({"out_hidden_size": 64}, "the tower's output .* has 64 numbers, the decoder 96"),
        ({"tokens_per_second": 0}, "tokens_per_second should be greater than 0"),
    ],
)
def test_a_wrong_tower_is_refused_by_name(
    changes: dict[str, Any], message: str, oracle: Qwen2_5_VLForConditionalGeneration
) -> None:
    config = oracle.config.to_dict()
    config["architectures"] = ["Qwen2_5_VLForConditionalGeneration"]
    config["vision_config"] |= changes
    with pytest.raises(CheckpointError, match=message):
        read_config(config)
