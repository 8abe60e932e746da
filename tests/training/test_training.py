"""Training: logits equal to transformers', prompts equal to the engine's, and runs that continue."""

from __future__ import annotations

import copy
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import nn
from training.cells import COLOR_NAMES
from training.export import export
from training.layout import SYSTEM_PROMPTS, Plan
from training.model import Student
from training.muon import BatchedMuon
from training.samples import BatchMaker, TrainingBatch
from training.scenes import LETTERS
from training.tokens import IGNORED, SYSTEM, ChatTokens

from mdi.bench.verify import verify
from mdi.checkpoint.source import open_source
from mdi.engine import Engine
from training import train


@given(st.text())
def test_any_text_survives_the_tokenizer(tokenizer_file: Path, text: str) -> None:
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("kind", ["still", "pair", "film"])
def test_transformers_computes_the_same_logits(kind: str, student: Student, maker: BatchMaker) -> None:
    batch = maker(3, Plan(kind, (4, 5), 4 if kind == "film" else 1, 2, question_first=True))
    theirs = copy.deepcopy(student.hf)
    theirs.set_attn_implementation("eager")
    with torch.no_grad():
        logits, _, at, _ = student.read(batch, student.encode(batch))
        for row in range(2):
            expected = _by_transformers(theirs, student, batch, row)[at[1][at[0] == row]]
            torch.testing.assert_close(logits[at[0] == row], expected, rtol=1e-4, atol=1e-5)


def _by_transformers(theirs: nn.Module, student: Student, batch: TrainingBatch, row: int) -> torch.Tensor:
    length = int((batch.branches[row] >= 0).sum())
    rows = (batch.rows[row].flatten(0, 1).float() / 255 - student.shift) * student.scale
    grid = torch.tensor([[batch.plan.n_frames // 2 or 1, 8, 10]] * batch.rows.shape[1])
    name = "pixel_values_videos" if batch.plan.kind == "film" else "pixel_values"
    grids = "video_grid_thw" if batch.plan.kind == "film" else "image_grid_thw"
    output = theirs(
        input_ids=batch.ids[row : row + 1, :length],
        position_ids=batch.positions[:, row : row + 1, :length],
        **{name: rows, grids: grid},
    )
    return output.logits[0]  # type: ignore[no-any-return]


def test_a_branch_does_not_see_its_neighbours(student: Student, maker: BatchMaker) -> None:
    batch = maker(5, Plan("still", (4, 4), 1, 1))
    assert batch.branches.max() >= 3
    with torch.no_grad():
        media = student.encode(batch)
        together, _, at, _ = student.read(batch, media)
        changed = batch.ids.clone()
        changed[batch.branches == 1] = 7
        batch.ids = changed
        apart, _, _, _ = student.read(batch, media)
    others = batch.branches[0, at[1]] > 1
    torch.testing.assert_close(together[others], apart[others])
    assert not torch.allclose(together[~others], apart[~others])


@pytest.mark.parametrize(("kind", "n_images"), [("still", 1), ("pair", 2)])
def test_prompts_are_those_of_the_engine(kind: str, n_images: int, maker: BatchMaker, engine: Engine) -> None:
    batch = maker(1, Plan(kind, (4, 4), 1, 6))
    for row, questions in enumerate(batch.questions):
        ids = batch.ids[row].tolist()
        system = next(p for p in SYSTEM_PROMPTS if maker._tokens.system(p) == ids[: len(maker._tokens.system(p))])
        parts: list[dict[str, Any]] = [{"type": "image", "image": _blank()}] * n_images
        content = [*parts, {"type": "text", "text": questions[0].text}]
        messages: list[dict[str, Any]] = [{"role": "system", "content": system}, {"role": "user", "content": content}]
        prompt = engine._prompts.build(messages)
        length = len(prompt.token_ids)
        assert tuple(ids[:length]) == prompt.token_ids
        assert torch.equal(batch.positions[:, row, :length], prompt.positions)
        assert batch.labels[row, length] != IGNORED


@pytest.fixture(scope="module")
def engine(untrained: Path) -> Iterator[Engine]:
    with Engine(untrained, dtype="float32") as engine:
        yield engine


def _blank() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (112, 112)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_halves_of_a_run_make_the_whole(
    tmp_path: Path, tokenizer_file: Path, tokens: ChatTokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "EVALUATION", (Plan("still", (4, 4), 1, 2), Plan("easy", (4, 4), 1, 2)))
    folders = [tmp_path / "whole", tmp_path / "halves"]
    for folder in folders:
        folder.mkdir()
        (folder / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    small = BatchMaker(tokens, patches_per_batch=128)
    for folder, stops in zip(folders, ((4,), (2, 4)), strict=True):
        for stop in stops:
            torch.manual_seed(0)
            run = train.Run(folder, steps=4, vision_steps=1, peak=1e-3, workers=0)
            run.maker = run.held_out = small
            run.train(until=stop)
    whole, halves = (torch.load(folder / "state.pt", weights_only=True)["student"] for folder in folders)
    for name, tensor in whole.items():
        torch.testing.assert_close(halves[name], tensor, rtol=1e-5, atol=1e-6)
    assert (tmp_path / "whole" / "curves.png").stat().st_size > 1000


def test_a_run_can_start_from_a_checkpoint(untrained: Path, tmp_path: Path) -> None:
    run = train.Run(tmp_path, steps=4, vision_steps=0, peak=1e-3, origin=untrained)
    assert (tmp_path / "tokenizer.json").read_bytes() == (untrained / "tokenizer.json").read_bytes()
    export(run.student, tmp_path / "tokenizer.json", tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (untrained / "model.safetensors").read_bytes()


def test_a_checkpoint_without_tokens_for_json_gets_them(
    tmp_path: Path, student: Student, plain_tokenizer_file: Path
) -> None:
    """Its own tokens keep their ids and weights, and a new one begins as the mean of those that spell it."""
    old, new = tmp_path / "old", tmp_path / "new"
    new.mkdir()
    export(student, plain_tokenizer_file, old)
    tensors = load_file(old / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:704].clone()
    save_file(tensors, old / "model.safetensors")
    run = train.Run(new, steps=4, vision_steps=0, peak=1e-3, origin=old)
    before, after = (Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in (old, new))
    assert before.get_vocab().items() < after.get_vocab().items()
    embeddings = run.student.hf.get_input_embeddings().weight
    n_known = before.get_vocab_size()
    assert torch.equal(embeddings[:n_known], tensors["model.embed_tokens.weight"][:n_known].float())
    spelled = before.encode("</tool_call>").ids
    assert len(spelled) > 1
    torch.testing.assert_close(embeddings[after.token_to_id("</tool_call>")], embeddings[spelled].mean(0))


def test_signs_are_spelled_in_json_too(tokens: ChatTokens) -> None:
    for text in ('{"text": "STORE"}', '{"sign":"STORE"}', "The text STORE."):
        pieces = [tokens.decode([index]).strip() for index in tokens.text(text)]
        assert [piece for piece in pieces if piece.isupper() and len(piece) == 1][-5:] == list("STORE")


def test_a_frozen_vision_tower_stays_as_it_is(untrained: Path, tmp_path: Path) -> None:
    run = train.Run(tmp_path, steps=4, vision_steps=0, peak=1e-2, origin=untrained, frozen_vision=True, patches=64)
    before = {name: tensor.clone() for name, tensor in run.student.hf.state_dict().items()}
    run._update(run.maker(1, Plan("still", (4, 4), 1, 1)))
    changed = {name for name, tensor in run.student.hf.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    assert not any("visual" in name for name in changed)


def test_accuracy_counts_whole_answers(student: Student, maker: BatchMaker) -> None:
    batch = maker(2, Plan("still", (4, 4), 1, 2))
    at = (batch.labels[:, 1:] != IGNORED).nonzero()
    all_right = torch.ones(len(at), dtype=torch.bool)
    n_questions = sum(map(len, batch.questions))
    assert [right for _, right in train.answers(batch, all_right, at.T)] == [True] * n_questions
    one_wrong = all_right.clone()
    one_wrong[0] = False
    assert sum(right for _, right in train.answers(batch, one_wrong, at.T)) == n_questions - 1


def test_the_command_says_what_it_needs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train"])
    with pytest.raises(SystemExit):
        train.main()
    assert "--run" in capsys.readouterr().err


def test_later_turns_are_laid_out_as_the_template_does(tokens: ChatTokens, engine: Engine) -> None:
    turns = [("How many stars?", "2"), ("What color is the left one?", "red")]
    ids = [*tokens.system(SYSTEM), *tokens.user_start(), *tokens.media(tokens.image_pad, 16), *tokens.text(turns[0][0])]
    ids += [*tokens.answer_start(), *tokens.answer([turns[0][1]]), *tokens.turn_end(), *tokens.user_start()]
    ids += [*tokens.text(turns[1][0]), *tokens.answer_start()]
    first = [{"type": "image", "image": _blank()}, {"type": "text", "text": turns[0][0]}]
    messages: list[tuple[str, object]] = [("user", first), ("assistant", turns[0][1]), ("user", turns[1][0])]
    asked: list[dict[str, Any]] = [{"role": role, "content": content} for role, content in messages]
    prompt = engine._prompts.build(asked)
    assert prompt.token_ids == tuple(ids)


def test_what_is_exported_loads_in_transformers_with_the_same_numbers(untrained: Path) -> None:
    content = [{"type": "image", "image": _blank()}, {"type": "text", "text": "What shape is this?"}]
    report = verify(open_source(untrained), [{"role": "user", "content": content}], dtype="float32", max_tokens=4)
    assert report.same_prompt
    assert report.relative < 1e-4
    assert report.first_difference is None


def test_muon_in_batches_is_muon() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((6, 9), (9, 6), (6, 9))
    weights = [torch.randn(shape, generator=generator) for shape in shapes]
    ours, theirs = ([torch.nn.Parameter(weight.clone()) for weight in weights] for _ in range(2))
    optimizers: tuple[torch.optim.Optimizer, ...] = (
        BatchedMuon(ours, lr=1.0, weight_decay=0.1),
        torch.optim.Muon(theirs, lr=1.0, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(3):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            other.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for mine, other, before in zip(ours, theirs, weights, strict=True):
        assert (mine - before).norm() > 0.1 * before.norm()
        torch.testing.assert_close(mine, other, rtol=0.02, atol=0.02)  # iterated in bfloat16


@pytest.mark.parametrize("kind", ["still", "pair", "film"])
def test_questions_point_at_what_they_are_about(kind: str, maker: BatchMaker) -> None:
    """Judged by the answers: a colour asked for is that of every cell pointed at, none of an absent thing is."""
    batch = maker(4, Plan(kind, (4, 4), 4 if kind == "film" else 1, 24))
    questions = [question for row in batch.questions for question in row]
    rows = batch.asked[: len(questions), 0]
    colors = batch.cells[rows].flatten(1, 2)[..., 1]
    judged = 0
    for question, pointed, shown in zip(questions, batch.pointed[: len(questions), 0] > 0, colors, strict=True):
        if question.answer in COLOR_NAMES:
            judged += int(pointed.any())
            assert {COLOR_NAMES[color] for color in shown[pointed].tolist()} <= {question.answer}
        if question.skill == "count" and question.answer == "0":
            assert not pointed.any()
    assert judged > 3


def test_reading_points_at_one_letter_after_the_other(maker: BatchMaker, tokens: ChatTokens) -> None:
    """The letter that the token behind spells is among those of the cell pointed at."""
    batch = maker(4, Plan("text", (4, 5), 1, 24))
    n_questions = sum(map(len, batch.questions))
    assert len(batch.asked) > n_questions
    for (row, at), pointed in zip(batch.asked[n_questions:].tolist(), batch.pointed[n_questions:, 1], strict=True):
        (cell,) = pointed.nonzero()
        spelled = tokens.decode(
            [int(batch.labels[row, at + 1])]
        ).strip()  # some letters have a token with the space before
        assert spelled in {LETTERS[index - 1] for index in batch.letters[row, 0, cell].flatten().tolist() if index}
