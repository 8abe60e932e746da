"""Vision tower, positions, logits and greedy tokens against transformers, on small random models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import Qwen2ForCausalLM, Qwen2VLForConditionalGeneration

from mdi.core.batch import Batch, Slice, Token, TokenSampling, Visual
from mdi.layers.rope import Grid, MediaSpan, prompt_positions
from mdi.models.stage import Stage, deepstack_of
from tests.parity.conftest import IMAGE, VIDEO, VISION_END, VISION_START, load_stages, qwen2_vl_config

GREEDY = TokenSampling(temperature=0, top_k=0, top_p=1, min_p=0, seed=0, sample=0, position=0)


def random_rows(grid: Grid, seed: int = 0, patch_elements: int = 1176) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(grid[0] * grid[1] * grid[2], patch_elements, generator=generator)


class Prompt:
    """Text pieces (token ids) and media grids in turn; a grid of more than one frame is a video."""

    def __init__(self, *pieces: Sequence[int] | Grid, seed: int = 0, patch_elements: int = 1176) -> None:
        self.patch_elements = patch_elements
        self.ids: list[int] = []
        self.spans: list[MediaSpan] = []
        self.rows: list[Tensor] = []
        for piece in pieces:
            if isinstance(piece, tuple):
                self._add_media(piece, seed + len(self.spans))
            else:
                self.ids += piece
        self.positions, self.delta = prompt_positions(len(self.ids), self.spans)

    def _add_media(self, grid: Grid, seed: int) -> None:
        span = MediaSpan(len(self.ids) + 1, grid, merge_size=2)
        self.spans.append(span)
        self.rows.append(random_rows(grid, seed, self.patch_elements))
        placeholder = IMAGE if grid[0] == 1 else VIDEO
        self.ids += [VISION_START, *[placeholder] * span.length, VISION_END]

    def oracle_inputs(self) -> dict[str, Any]:
        ids = torch.tensor([self.ids])
        inputs: dict[str, Any] = {
            "input_ids": ids,
            "mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int(),
        }
        for kind, is_video in (("image", False), ("video", True)):
            chosen = [index for index, span in enumerate(self.spans) if (span.grid[0] > 1) == is_video]
            if chosen:
                suffix = "_videos" if is_video else ""
                inputs["pixel_values" + suffix] = torch.cat([self.rows[index] for index in chosen])
                inputs[f"{kind}_grid_thw"] = torch.tensor([self.spans[index].grid for index in chosen])
        return inputs

    def visuals(self, stage: Stage, first_row: int = 0) -> list[Visual]:
        return [
            Visual(first_row + span.start, encode(stage, rows, span.grid))
            for span, rows in zip(self.spans, self.rows, strict=True)
        ]


def encode(stage: Stage, rows: Tensor, grid: Grid) -> Tensor:
    steps = stage.encode_steps(rows, grid)
    while True:
        try:
            next(steps)
        except StopIteration as done:
            return cast(Tensor, done.value)


TEXT = list(range(1, 40))
PROMPTS = {
    "text": Prompt(TEXT),
    "one image": Prompt(TEXT[:5], (1, 8, 12), TEXT[:9]),
    "image first": Prompt((1, 4, 4), TEXT[:3]),
    "long": Prompt(TEXT * 4, (1, 16, 24), TEXT * 3),
    "three images": Prompt(TEXT[:4], (1, 8, 12), TEXT[3:6], (1, 16, 4), (1, 2, 2), TEXT[:7]),
}


def run_chain(stages: Sequence[Stage], batch: Batch, hidden: Tensor) -> tuple[Token, ...]:
    for stage in stages:
        hidden = stage.run(batch, hidden)
        batch = batch.beyond(stage.spec.last_layer)
    result = stages[-1].sample(batch, hidden)
    assert result
    return result.tokens


def greedy_tokens(stages: Sequence[Stage], prompts: Sequence[Prompt], n_tokens: int) -> list[list[int]]:
    """Every prompt in a slot of its own, all in one packed batch a step."""
    slices = tuple(Slice(slot, 0, len(prompt.ids), (GREEDY,)) for slot, prompt in enumerate(prompts))
    positions = torch.cat([prompt.positions for prompt in prompts], dim=1)
    ids, visuals = list[int](), list[Visual]()
    for prompt in prompts:
        visuals += prompt.visuals(stages[0], len(ids))
        ids += prompt.ids
    hidden = stages[0].embed(torch.tensor(ids), visuals)
    batch = Batch(0, slices, positions, deepstack=deepstack_of(visuals, hidden.shape[1]))
    tokens = run_chain(stages, batch, hidden)
    answers = [[token.id] for token in tokens]
    for step in range(1, n_tokens):
        starts = [len(prompt.ids) + step - 1 for prompt in prompts]
        slices = tuple(Slice(slot, start, 1, (GREEDY,)) for slot, start in enumerate(starts))
        positions = torch.tensor([start + prompt.delta for start, prompt in zip(starts, prompts, strict=True)])
        hidden = stages[0].embed(torch.tensor([answer[-1] for answer in answers]))
        tokens = run_chain(stages, Batch(step, slices, positions.expand(3, -1)), hidden)
        for answer, token in zip(answers, tokens, strict=True):
            answer.append(token.id)
    return answers


def logits_of(stages: Sequence[Stage], prompt: Prompt, chunk: int = 10**6) -> Tensor:
    """Logits of all positions, the prompt brought in chunks."""
    visuals = prompt.visuals(stages[0])
    hidden = stages[0].embed(torch.tensor(prompt.ids), visuals)
    deepstack = deepstack_of(visuals, hidden.shape[1])
    pieces = []
    for start in range(0, len(prompt.ids), chunk):
        end = min(start + chunk, len(prompt.ids))
        part = deepstack.between(start, end) if deepstack else None
        batch = Batch(start, (Slice(0, start, end - start),), prompt.positions[:, start:end], deepstack=part)
        out: Any = hidden[start:end]
        for stage in stages[:-1]:
            out = stage.run(batch, out)
            batch = batch.beyond(stage.spec.last_layer)
        pieces.append(stages[-1].logits(batch, out))
    return torch.cat(pieces)


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@torch.no_grad()
def oracle_logits(
    oracle: Qwen2VLForConditionalGeneration, prompt: Prompt, dtype: torch.dtype = torch.float32
) -> Tensor:
    inputs = {
        name: value.to(dtype) if value.is_floating_point() else value for name, value in prompt.oracle_inputs().items()
    }
    return cast(Tensor, oracle(**inputs, use_cache=False).logits[0].float())


@pytest.mark.parametrize("grid", [(1, 8, 12), (1, 2, 2), (1, 30, 4), (3, 6, 8)])
def test_the_vision_tower_gives_the_numbers_of_transformers(
    grid: Grid, oracle: Qwen2VLForConditionalGeneration, checkpoint: Path
) -> None:
    [stage] = load_stages(checkpoint)
    rows = random_rows(grid)
    with torch.no_grad():
        theirs = oracle.model.visual(rows, grid_thw=torch.tensor([grid])).pooler_output
    assert relative_difference(encode(stage, rows, grid), theirs) < 1e-5


@pytest.mark.parametrize("name", PROMPTS)
def test_positions_equal_those_of_transformers(name: str, oracle: Qwen2VLForConditionalGeneration) -> None:
    prompt = PROMPTS[name]
    inputs = prompt.oracle_inputs()
    theirs, delta = oracle.model.get_rope_index(
        inputs["input_ids"], inputs["mm_token_type_ids"], inputs.get("image_grid_thw")
    )
    assert torch.equal(prompt.positions, theirs[:, 0])
    assert prompt.delta == int(delta)


def test_video_positions_follow_transformers_4() -> None:
    # transformers 4.57, Qwen2VLModel.get_rope_index, for [1, 2, <vision_start>, 3 frames of 2 x 3, <vision_end>, 3]
    prompt = Prompt([1, 2], (3, 4, 6), [3])
    grid = [(t, h, w) for t in range(3) for h in range(2) for w in range(3)]
    expected = [(0,) * 3, (1,) * 3, (2,) * 3, *[(3 + t, 3 + h, 3 + w) for t, h, w in grid], (6,) * 3, (7,) * 3]
    assert [tuple(column) for column in prompt.positions.T.tolist()] == expected
    assert prompt.delta == 8 - len(prompt.ids)


def test_a_long_video_advances_by_its_frames() -> None:
    prompt = Prompt([1], (9, 2, 4), [2, 3])
    assert prompt.positions[:, -1].tolist() == [2 + 9 + 2] * 3


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("cuts", [(), (2,), (1, 4), (1, 2, 3, 5)], ids=lambda cuts: f"{len(cuts) + 1} stages")
def test_logits_are_within_1e_4_of_transformers(
    name: str, cuts: tuple[int, ...], oracle: Qwen2VLForConditionalGeneration, checkpoint: Path
) -> None:
    ours = logits_of(load_stages(checkpoint, *cuts), PROMPTS[name])
    assert relative_difference(ours, oracle_logits(oracle, PROMPTS[name])) < 1e-4


@pytest.mark.parametrize(("name", "chunk"), [("three images", 1), ("three images", 7), ("long", 64), ("long", 200)])
def test_a_chunked_prefill_gives_the_same_logits(
    name: str, chunk: int, oracle: Qwen2VLForConditionalGeneration, checkpoint: Path
) -> None:
    prompt = PROMPTS[name]
    ours = logits_of(load_stages(checkpoint, 3), prompt, chunk)
    assert relative_difference(ours, oracle_logits(oracle, prompt)) < 1e-4


def test_a_video_gives_the_logits_of_transformers_at_the_same_positions(
    oracle: Qwen2VLForConditionalGeneration, checkpoint: Path
) -> None:
    prompt = Prompt(TEXT[:5], (3, 8, 6), TEXT[:9])
    with torch.no_grad():  # positions handed over: transformers 5 makes other ones for video
        theirs = oracle(**prompt.oracle_inputs(), position_ids=prompt.positions[:, None], use_cache=False).logits[0]
    assert relative_difference(logits_of(load_stages(checkpoint), prompt), theirs) < 1e-4


def test_bfloat16_stays_close_to_transformers_in_bfloat16(tmp_path: Path) -> None:
    torch.manual_seed(2)
    oracle = Qwen2VLForConditionalGeneration(qwen2_vl_config(initializer_range=0.06)).to(torch.bfloat16).eval()
    oracle.save_pretrained(tmp_path)
    exact_model = Qwen2VLForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).eval()
    [stage] = load_stages(tmp_path, dtype=torch.bfloat16)
    for prompt in PROMPTS.values():
        exact, theirs = oracle_logits(exact_model, prompt), oracle_logits(oracle, prompt, torch.bfloat16)
        ours = logits_of([stage], prompt).float()
        assert torch.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.999
        assert (ours - exact).norm() < 1.1 * (theirs - exact).norm()  # no further from the truth than the reference


@pytest.mark.parametrize("cuts", [(), (2,), (1, 4), (1, 2, 3, 5)], ids=lambda cuts: f"{len(cuts) + 1} stages")
def test_greedy_tokens_equal_those_of_transformers_alone_and_in_a_mixed_batch_of_eight(
    cuts: tuple[int, ...], oracle: Qwen2VLForConditionalGeneration, checkpoint: Path
) -> None:
    prompts = [*PROMPTS.values(), *(Prompt(TEXT[:i], (1, 4, 2 * i), TEXT[i:], seed=i) for i in range(3, 6))]
    with torch.no_grad():
        theirs = [
            oracle.generate(**prompt.oracle_inputs(), max_new_tokens=12, do_sample=False, eos_token_id=None)[
                0, len(prompt.ids) :
            ].tolist()
            for prompt in prompts
        ]
    stages = load_stages(checkpoint, *cuts)
    assert greedy_tokens(stages, prompts, 12) == theirs
    assert [greedy_tokens(stages, [prompt], 12)[0] for prompt in prompts] == theirs


def test_a_text_model_runs_through_the_same_decoder(text_oracle: Qwen2ForCausalLM, tmp_path: Path) -> None:
    text_oracle.save_pretrained(tmp_path)
    prompt = Prompt(TEXT)
    with torch.no_grad():
        theirs = text_oracle(torch.tensor([prompt.ids]), use_cache=False).logits[0]
    assert relative_difference(logits_of(load_stages(tmp_path, 2), prompt), theirs) < 1e-4
