"""From a seed to one training batch: pictures drawn and cut into patches, conversations laid out as tokens.

All samples of a batch have grids of the same sizes, so the vision tower sees a dense batch. A picture is encoded once
and has many questions: each conversation is a branch that attends to the media before it, to no other branch,
and starts at the same rotary position.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mdi.media import smart_resize
from training.cells import Cells, Grid
from training.json_answers import in_json, whole_in_json
from training.layout import MERGE, PATCH, TEMPORAL, Layout, Plan, lay_out, point_while_speaking
from training.questions import WORDINGS, Asker, Question
from training.scenes import FACTOR, Picture, Scene, SceneMaker, draw
from training.tokens import IGNORED, ChatTokens
from training.tool_calls import Tool, Workshop
from training.unknown import BLIND, GREETING, GREETINGS, strange_question

MIN_PIXELS, MAX_PIXELS = 112 * 112, 168 * 168  # scenes look alike at all sizes: more pixels would show no more
GRIDS: tuple[tuple[Grid, float], ...] = (
    ((4, 4), 0.12), ((4, 5), 0.25), ((5, 4), 0.25), ((5, 5), 0.04), ((4, 6), 0.04), ((6, 4), 0.04), ((5, 6), 0.2),
    ((6, 5), 0.2), ((6, 6), 0.06), ((4, 7), 0.03), ((7, 4), 0.03), ((5, 7), 0.06), ((7, 5), 0.06),
)  # fmt: skip
KINDS = (
    ("still", 0.24), ("text", 0.11), ("pair", 0.14), ("film", 0.08), ("tools", 0.26), ("told", 0.14), ("easy", 0.02),
    ("blind", 0.01),
)  # fmt: skip
BRANCHES = {"still": 8, "easy": 6, "text": 4, "pair": 8, "film": 8, "tools": 3}
JSON_SHARE = 0.25  # of the questions
REQUESTS = 5  # for tools, of a picture
HARD_SHARE = 0.35  # of the scenes


@dataclass
class Sample:
    rows: Tensor  # uint8 [media, t * patches, 1176]
    layout: Layout
    questions: list[Question]
    cells: Cells
    pointed: Tensor  # float32 [asked, 2, cells of all media]: which cells show what it is about; see `Cells.pointed`


@dataclass
class TrainingBatch:
    """The samples stacked, tokens padded.

    rows: uint8 [n, media, t * patches, 1176]; numbers: see `Layout`; cells: [n, media * t, cells, 3]; asked: row and
    position [n, 2], those of the questions first; pointed: [n, 2, media * t * cells].
    """

    plan: Plan
    rows: Tensor
    ids: Tensor
    labels: Tensor
    weights: Tensor
    branches: Tensor
    numbers: Tensor
    positions: Tensor
    cells: Tensor
    letters: Tensor
    asked: Tensor
    pointed: Tensor
    questions: list[list[Question]]

    def to(self, device: torch.device) -> TrainingBatch:
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)


class BatchMaker:
    """Deterministic: batch `index` of a split is always the same."""

    def __init__(self, tokens: ChatTokens, held_out: bool = False, patches_per_batch: int = 2048) -> None:
        self._tokens = tokens
        self._held_out = held_out
        self._split = "held-out" if held_out else "training"
        self._patches_per_batch = patches_per_batch

    def __call__(self, index: int, plan: Plan | None = None, asks: bool = True) -> TrainingBatch:
        """plan: what to draw, by default a random mix. asks: False for pictures alone, nothing asked."""
        random = Random(f"{self._split} batch {index}")
        plan = plan or (self._plan(random) if asks else self._vision_plan(random))
        samples = [self._sample(f"{self._split} {index} {row}", plan) for row in range(plan.n_samples)]
        return _collate(plan, samples, self._tokens.special["<|endoftext|>"])

    def _plan(self, random: Random) -> Plan:
        kind = random.choices([kind for kind, _ in KINDS], [weight for _, weight in KINDS])[0]
        grid = (4, 4) if kind == "easy" else _grid(random)
        n_frames = random.choice((4, 4, 6, 8)) if kind == "film" else 1
        n_media = 2 if kind == "pair" else max(1, n_frames // TEMPORAL)
        patches = grid[0] * grid[1] * MERGE**2 * n_media
        first = random.random() < 0.06 and kind != "tools"
        return Plan(kind, grid, n_frames, max(3, self._patches_per_batch // patches), first, json_share=JSON_SHARE)

    def _vision_plan(self, random: Random) -> Plan:
        grid = _grid(random)
        patches = grid[0] * grid[1] * MERGE**2
        kind = random.choices(("still", "text", "page"), (0.12, 0.28, 0.6))[0]
        return Plan(kind, grid, 1, max(3, self._patches_per_batch // patches), asks=False)

    def _sample(self, seed: str, plan: Plan) -> Sample:
        maker = SceneMaker(seed, self._held_out)
        random = maker.random
        if plan.kind == "blind":
            return _blind_sample(self._tokens, random, plan)
        if plan.kind == "told":
            return self._told_sample(maker, plan)
        tools: list[Tool] = []
        if plan.kind == "easy":
            still, questions = _easy_sample(random)
            conversations = _turns(random, questions)
            frames, pictures = [np.asarray(still.resize((112, 112), Image.Resampling.BICUBIC))], []
        else:
            scene, tools, conversations = self._scene(maker, plan)
            smooth = random.random() < 0.8
            frames = [_pixels(picture, plan.grid, smooth) for picture in scene.pictures]
            pictures = list(scene.pictures)
        if plan.question_first:
            conversations = [conversations[0][:1]]
        media = [[frame, frame] for frame in frames] if plan.kind != "film" else [frames]
        rows = torch.stack([torch.from_numpy(cut(np.stack(film))) for film in media])
        labelled = pictures if plan.kind != "film" else pictures[1::2]
        cells = Cells.of(labelled, plan.grid) if pictures else Cells.unknown(plan.grid)
        layout = lay_out(self._tokens, random, plan, conversations, tools)
        questions = [question for conversation in conversations for question in conversation]
        pointed = cells.pointed(questions)
        if pictures:
            pointed = point_while_speaking(self._tokens, layout, questions, pointed, cells)
        return Sample(rows, layout, questions, cells, pointed)

    def _scene(self, maker: SceneMaker, plan: Plan) -> tuple[Scene, list[Tool], list[list[Question]]]:
        """A scene that something can be asked about; the tools and the conversations."""
        r = maker.random
        makers = {"still": maker.still, "text": maker.text, "page": maker.page, "pair": maker.pair}
        hard = not self._held_out and plan.asks and r.random() < HARD_SHARE
        while True:
            width, height = _canvas(r, plan.grid)
            film = plan.kind == "film"
            name = "still" if plan.kind == "tools" else plan.kind
            scene = maker.film(width, height, plan.n_frames) if film else makers[name](width, height)
            if not plan.asks:
                return scene, [], []
            if hard and not is_hard(scene):
                continue
            questions = Asker(r, self._held_out).questions(scene, BRANCHES[plan.kind])
            questions = [self._maybe_in_json(question, scene, r, plan) for question in questions]
            tools, requests = self._requests(scene, Workshop(r, self._held_out)) if plan.kind == "tools" else ([], [])
            if questions:
                return scene, tools, _turns(r, questions) + requests

    def _maybe_in_json(self, question: Question, scene: Scene, random: Random, plan: Plan) -> Question:
        if question.skill == "strange" or random.random() >= plan.json_share:
            return question
        if question.skill == "describe" and random.random() < 0.85:
            return whole_in_json(question, scene.pictures[0], random)
        return in_json(question, random, self._held_out)

    def _told_sample(self, maker: SceneMaker, plan: Plan) -> Sample:
        """Tools, and requests that say all there is to know: no image."""
        workshop = Workshop(maker.random, self._held_out, told=True)
        requests: list[list[Question]] = []
        while not requests:
            tools, requests = self._requests(maker.still(*_canvas(maker.random, plan.grid)), workshop)
        return _without_images(lay_out(self._tokens, maker.random, plan, requests, tools), plan, requests)

    def _requests(self, scene: Scene, workshop: Workshop) -> tuple[list[Tool], list[list[Question]]]:
        tools = workshop.tools()
        found = {
            talk[0].text: talk for _ in range(2 * REQUESTS) if (talk := workshop.conversation(scene, tools)) is not None
        }
        return tools, list(found.values())[:REQUESTS]


def is_hard(scene: Scene) -> bool:
    """Whether a scene is of a kind that is learnt last and seldom drawn."""
    shapes = [[thing for thing in picture.things if thing.kind != "text"] for picture in scene.pictures]
    if scene.skill == "pair":
        return len(shapes[0]) == len(shapes[1]) == 1
    if scene.skill == "film":
        return scene.vanishing is not None or scene.appearing is not None
    return len(shapes[0]) > 3 or len(scene.pictures[0].things) - len(shapes[0]) > 1


def _grid(random: Random) -> Grid:
    return random.choices([grid for grid, _ in GRIDS], [weight for _, weight in GRIDS])[0]


def _canvas(random: Random, grid: Grid) -> tuple[int, int]:
    """A size in pixels that is resized to `grid`."""
    rows, columns = grid
    while True:
        scale = random.choice((1.0, 1.0, random.uniform(0.5, 1.0), random.uniform(1.0, 2.6)))
        width = round(columns * FACTOR * scale + random.uniform(-12, 12))
        height = round(rows * FACTOR * scale + random.uniform(-12, 12))
        if smart_resize(height, width, FACTOR, MIN_PIXELS, MAX_PIXELS) == (rows * FACTOR, columns * FACTOR):
            return width, height


def _pixels(picture: Picture, grid: Grid, smooth: bool) -> np.ndarray:
    """The picture at the size of its grid: uint8 [height, width, 3]."""
    size = (grid[1] * FACTOR, grid[0] * FACTOR)
    return np.asarray(draw(picture, smooth).resize(size, Image.Resampling.BICUBIC))


def cut(frames: np.ndarray) -> np.ndarray:
    """Frames uint8 [t * 2, height, width, 3] as patch rows [t * patches, 3 * 2 * 14 * 14], in merge order."""
    n_frames, height, width, channels = frames.shape
    side = PATCH * MERGE
    blocks = frames.reshape(
        n_frames // TEMPORAL, TEMPORAL, height // side, MERGE, PATCH, width // side, MERGE, PATCH, channels
    )
    order = blocks.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)
    return np.ascontiguousarray(order).reshape(-1, channels * TEMPORAL * PATCH * PATCH)


@cache
def _easy_vqa() -> tuple[list[str], list[list[Question]]]:
    """The training split of easy-vqa: pictures, and the questions about each."""
    from easy_vqa import get_train_image_paths, get_train_questions

    texts, answers, pictures = get_train_questions()
    paths = get_train_image_paths()
    questions: list[list[Question]] = [[] for _ in paths]
    for text, answer, picture in zip(texts, answers, pictures, strict=True):
        questions[picture].append(Question("easy-vqa", text, answer))
    return [paths[index] for index in range(len(paths))], questions


def _easy_sample(random: Random) -> tuple[Image.Image, list[Question]]:
    paths, questions = _easy_vqa()
    index = random.randrange(len(paths))
    chosen = questions[index]
    return Image.open(Path(paths[index])).convert("RGB"), random.sample(chosen, min(len(chosen), BRANCHES["easy"]))


def _blind_sample(tokens: ChatTokens, random: Random, plan: Plan) -> Sample:
    """A question without an image."""
    if random.random() < 0.3:
        question = Question("strange", random.choice(GREETINGS), GREETING)
    else:
        wording = random.choice(random.choice(list(WORDINGS.values()))[0])
        names = {"things": "shapes", "thing": "circle", "a": "a circle", "side": "left of", "level": "top"}
        text = wording.format_map(defaultdict(lambda: "the circle", names, question="What do you see?", nth="first"))
        question = Question("strange", random.choice((text, strange_question(random))), BLIND)
    return _without_images(lay_out(tokens, random, plan, [[question]]), plan, [[question]])


def _without_images(layout: Layout, plan: Plan, conversations: Sequence[Sequence[Question]]) -> Sample:
    empty = torch.empty(0, 0, PATCH * PATCH * TEMPORAL * 3, dtype=torch.uint8)
    cells = Cells.of([], plan.grid)
    questions = [question for conversation in conversations for question in conversation]
    return Sample(empty, layout, questions, cells, cells.pointed(questions))


# Tokens


def _turns(random: Random, questions: Sequence[Question]) -> list[list[Question]]:
    """Mostly single questions; now and then a conversation of two or three."""
    turns: list[list[Question]] = []
    index = 0
    while index < len(questions):
        length = random.choices((1, 2, 3), (0.88, 0.09, 0.03))[0]
        turns.append(list(questions[index : index + length]))
        index += length
    return turns


def _collate(plan: Plan, samples: Sequence[Sample], pad: int) -> TrainingBatch:
    longest = -(-max(len(sample.layout.ids) for sample in samples) // 16) * 16

    def padded(name: str, value: float, dtype: torch.dtype) -> Tensor:
        out = torch.full((len(samples), longest), value, dtype=dtype)
        for row, sample in zip(out, samples, strict=True):
            values = getattr(sample.layout, name)
            row[: len(values)] = torch.tensor(values, dtype=dtype)
        return out

    positions = torch.zeros(3, len(samples), longest, dtype=torch.int64)
    for row, sample in enumerate(samples):
        positions[:, row, : sample.layout.positions.shape[1]] = sample.layout.positions
    return TrainingBatch(
        plan,
        torch.stack([sample.rows for sample in samples]),
        padded("ids", pad, torch.int64),
        padded("labels", IGNORED, torch.int64),
        padded("weights", 0.0, torch.float32),
        padded("branches", -1, torch.int64),
        padded("numbers", -1, torch.int64),
        positions,
        torch.stack([sample.cells.shown for sample in samples]),
        torch.stack([sample.cells.letters for sample in samples]),
        *_collate_pointed(samples),
        [sample.questions for sample in samples],
    )


def _collate_pointed(samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """Those of the questions first, in their order."""
    places = [(row, end) for row, sample in enumerate(samples) for end in sample.layout.asked]
    of_question = [index < len(sample.questions) for sample in samples for index in range(len(sample.layout.asked))]
    order = sorted(range(len(places)), key=lambda index: not of_question[index])
    pointed = torch.cat([sample.pointed for sample in samples])
    return torch.tensor(places).view(-1, 2)[order], pointed[order]
