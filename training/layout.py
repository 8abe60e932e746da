"""Conversations about one picture as tokens: branches behind its media, what is learnt of them, where they point."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from mdi.layers.rope import MediaSpan, prompt_positions
from training.cells import Cells, Grid
from training.questions import Piece, Question
from training.tokens import IGNORED, SYSTEM, ChatTokens
from training.tool_calls import Tool, listed

PATCH, MERGE, TEMPORAL = 14, 2, 2
SYSTEM_PROMPTS = (
    SYSTEM, SYSTEM, SYSTEM, SYSTEM, "Answer in one word.", "You look at pictures and answer questions.",
    "Answer briefly.", "You are a careful observer.",
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What one batch holds."""

    kind: str  # still, text, pair, film, tools, easy; without images: told, blind
    grid: Grid
    n_frames: int  # frames of a film; 1 otherwise
    n_samples: int
    question_first: bool = False
    asks: bool = True  # or else the cells are all there is to learn
    json_share: float = 0.0


@dataclass
class Layout:
    """Conversations as tokens. numbers: of the question whose answer a token is a chosen part of, from 0; or -1."""

    ids: list[int]
    labels: list[int]
    weights: list[float]
    branches: list[int]
    numbers: list[int]
    positions: Tensor  # [3, T]
    asked: list[int]  # where each question ends, the position of the token before its answer; then other such places


def lay_out(
    tokens: ChatTokens,
    random: Random,
    plan: Plan,
    conversations: Sequence[Sequence[Question]],
    tools: Sequence[Tool] = (),
) -> Layout:
    system = tokens.system(listed(random.choice(SYSTEM_PROMPTS), tools))
    frames = plan.n_frames // TEMPORAL if plan.kind == "film" else 1
    pad = tokens.video_pad if plan.kind == "film" else tokens.image_pad
    n_media = {"pair": 2, "blind": 0, "told": 0}.get(plan.kind, 1)
    media = tokens.media(pad, frames * plan.grid[0] * plan.grid[1])
    ids = system + tokens.user_start()
    grid = (frames, plan.grid[0] * MERGE, plan.grid[1] * MERGE)
    if plan.question_first:
        ids += tokens.text(conversations[0][0].text)
    spans = [MediaSpan(len(ids) + 1 + index * len(media), grid, MERGE) for index in range(n_media)]
    ids += media * n_media
    positions, delta = prompt_positions(len(ids), spans)
    next_position = len(ids) + delta
    labels, weights, branches, numbers = [IGNORED] * len(ids), [0.0] * len(ids), [0] * len(ids), [-1] * len(ids)
    pieces = [positions]
    ends: list[int] = []
    for branch, conversation in enumerate(conversations, start=1):
        start = len(ids)
        for turn, question in enumerate(conversation):
            asked = [] if turn == 0 else tokens.turn_end() + tokens.user_start()
            asked += [] if plan.question_first else tokens.text(question.text)
            asked += tokens.answer_start()
            answer = tokens.answer(question.texts)
            shares = _shares(tokens, question)
            ids += asked + answer
            numbers += [-1] * len(asked) + [len(ends) if share == 1 else -1 for share in shares]
            ends.append(len(ids) - len(answer) - 1)
            labels += [IGNORED] * len(asked) + answer
            weights += [0.0] * len(asked) + [share * sum(shares) ** -0.5 for share in shares]
        length = len(ids) - start
        branches += [branch] * length
        pieces.append(torch.arange(next_position, next_position + length).expand(3, length))
    return Layout(ids, labels, weights, branches, numbers, torch.cat(pieces, dim=1), ends)


def _shares(tokens: ChatTokens, question: Question) -> list[float]:
    """Weight of each token of an answer, its end included: that of the piece in which it begins."""
    by_character = [piece.weight for piece in question.pieces or (Piece(question.answer),) for _ in piece.text]
    return [*(by_character[first] for first in tokens.first_characters(question.texts)), 1.0]


def point_while_speaking(
    tokens: ChatTokens, layout: Layout, questions: Sequence[Question], pointed: Tensor, cells: Cells
) -> Tensor:
    """Where an answer goes through things or letters, each token points at the next; adds to `layout.asked`."""
    more = []
    for question, rows, end in zip(questions, pointed, tuple(layout.asked), strict=True):
        spoken = cells.spoken(question)
        for index, last in enumerate(tokens.last_characters(question.texts) if spoken else ()):
            target = next((mask for first, behind, mask in spoken if first <= last < behind), None)
            if target is not None and index == 0:
                rows[1] = target
            elif target is not None:
                layout.asked.append(end + index)
                more.append(torch.stack([torch.full_like(target, IGNORED), target]))
    return torch.cat([pointed, torch.stack(more)]) if more else pointed
