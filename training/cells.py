"""What every cell of a picture's grid shows, and where questions and answers point: supervision beside the answers.

All of it comes from the scene; nothing here looks at pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from training.fonts import font
from training.questions import Question
from training.scenes import COLORS, LETTERS, SHAPES, Look, Picture, Thing, draw_thing
from training.tokens import IGNORED

COLUMNS_PER_CELL = 4  # a cell may show the middles of up to so many letters, side by side
KIND_NAMES = ("", *SHAPES, "text")
COLOR_NAMES = ("", *COLORS)
FINE = 6  # points to a side of a cell, to see what covers it
COVERED = 0.12  # least share of a cell that a thing fills to be seen there

Grid = tuple[int, int]  # tokens: rows, columns
Spoken = tuple[int, int, Tensor]  # first and behind the last character of a part of an answer; the cells it speaks of


@dataclass(frozen=True)
class Cells:
    """The cells of all pictures of a sample.

    shown: int64 [pictures, cells, 3]: kind and colour of what fills most of it, how many have their centre there;
    IGNORED where not known. letters: int64 [pictures, cells, COLUMNS_PER_CELL]: 0, or 1 + the index of the letter with
    its middle there. looks: of what each cell of each picture shows; empty where not known.
    """

    pictures: Sequence[Picture]
    grid: Grid
    shown: Tensor
    letters: Tensor
    looks: list[list[Look | None]]

    @classmethod
    def of(cls, pictures: Sequence[Picture], grid: Grid) -> Cells:
        n_cells = grid[0] * grid[1]
        shown = torch.zeros(len(pictures), n_cells, 3, dtype=torch.int64)
        letters = torch.zeros(len(pictures), n_cells, COLUMNS_PER_CELL, dtype=torch.int64)
        looks = [_label(picture, grid, *tensors) for picture, *tensors in zip(pictures, shown, letters, strict=True)]
        return cls(pictures, grid, shown, letters, looks)

    @classmethod
    def unknown(cls, grid: Grid) -> Cells:
        """Of one picture of which nothing is known."""
        n_cells = grid[0] * grid[1]
        letters = torch.zeros(1, n_cells, COLUMNS_PER_CELL, dtype=torch.int64)
        return cls([], grid, torch.full((1, n_cells, 3), IGNORED), letters, [])

    def pointed(self, questions: Sequence[Question]) -> Tensor:
        """Float32 [questions, 2, cells]: 1 where a cell shows what a question is about; what that is compared with.

        The second, where nothing is compared: the centres of the first. IGNORED where not known.
        """
        pointed = torch.full((len(questions), 2, sum(map(len, self.looks))), float(IGNORED))
        for question, (about, other) in zip(questions, pointed, strict=True):
            if question.about is not None and self.looks:
                about[:] = self._showing(question.about, question.nth)
                other[:] = (
                    self._centres(question.about, question.nth)
                    if question.other is None
                    else self._showing(question.other)
                )
        return pointed

    def spoken(self, question: Question) -> list[Spoken]:
        """The parts of an answer that goes through things, or through the letters of a sign, in order."""
        if question.pieces:
            return list(self._spoken_pieces(question))
        if question.skill not in ("read", "describe"):
            return []
        (picture,) = self.pictures
        parts: list[Spoken] = []
        behind = 0
        for thing in sorted(picture.things, key=lambda thing: thing.x):
            name = thing.text or f"{thing.color} {thing.kind}"
            first = question.answer.find(name, behind)
            if first < 0 or thing.look not in (question.about or ()):
                continue
            behind = first + len(name)
            if thing.text:
                parts += self._spelled(thing, first)
            else:
                parts.append((first, behind, self._showing(frozenset([thing.look]))))
        return parts

    def _spoken_pieces(self, question: Question) -> Iterator[Spoken]:
        first = 0
        for piece in question.pieces:
            behind = first + len(piece.text)
            sign = next((thing for thing in self.pictures[0].things if thing.look == piece.about and thing.text), None)
            if sign is not None and piece.text == sign.text:
                yield from self._spelled(sign, first)
            elif piece.about is not None:
                yield first, behind, self._showing(frozenset([piece.about]), question.nth)
            first = behind

    def _spelled(self, thing: Thing, first: int) -> Iterator[Spoken]:
        for index, (_, x) in enumerate(_letter_middles(thing), start=first):
            mask = torch.zeros(sum(map(len, self.looks)))
            mask[_cell(x, thing.y, self.pictures[0], self.grid)] = 1
            yield index, index + 1, mask

    def _showing(self, wanted: frozenset[Look], nth: int | None = None) -> Tensor:
        hits = [look in wanted and nth in (None, index) for index, looks in enumerate(self.looks) for look in looks]
        return torch.tensor(hits, dtype=torch.float32)

    def _centres(self, wanted: frozenset[Look], nth: int | None) -> Tensor:
        centres = torch.zeros(len(self.pictures), self.grid[0] * self.grid[1])
        for index, (picture, mask) in enumerate(zip(self.pictures, centres, strict=True)):
            for thing in picture.things:
                if thing.look in wanted and nth in (None, index):
                    mask[_cell(thing.x, thing.y, picture, self.grid)] = 1
        return centres.flatten()


def _label(picture: Picture, grid: Grid, shown: Tensor, letters: Tensor) -> list[Look | None]:
    """Fills in `shown` and `letters` of one picture; its looks."""
    looks: list[Look | None] = [None] * len(shown)
    if not picture.things:
        return looks
    rows, columns = grid
    across, down = picture.extent
    image = Image.new("L", (columns * FINE, rows * FINE))
    canvas = ImageDraw.Draw(image)
    for number, thing in enumerate(picture.things, start=1):
        _draw_label(canvas, thing, image.width / across, image.height / down, number)
        if thing.kind == "text":
            _label_letters(thing, picture, grid, letters)
        else:
            cell = _cell(thing.x, thing.y, picture, grid)
            shown[cell, 2] = min(3, int(shown[cell, 2]) + 1)
    points = np.asarray(image).reshape(rows, FINE, columns, FINE).transpose(0, 2, 1, 3).reshape(rows * columns, -1)
    counts = np.stack([(points == number).sum(1) for number in range(1, len(picture.things) + 1)], 1)
    winner = counts.argmax(1)
    for cell in np.flatnonzero(counts.max(1) >= FINE * FINE * COVERED).tolist():
        thing = picture.things[winner[cell]]
        shown[cell, 0] = KIND_NAMES.index(thing.kind)
        shown[cell, 1] = COLOR_NAMES.index(thing.color)
        looks[cell] = thing.look
    return looks


def _draw_label(canvas: ImageDraw.ImageDraw, thing: Thing, scale_x: float, scale_y: float, number: int) -> None:
    if thing.kind == "text":
        half_w, half_h = thing.size * thing.aspect / 2, thing.size / 2
        box = ((thing.x - half_w) * scale_x, (thing.y - half_h) * scale_y)
        canvas.rectangle((*box, (thing.x + half_w) * scale_x, (thing.y + half_h) * scale_y), number)
        return
    scale = (scale_x + scale_y) / 2  # the resize keeps the aspect ratio, but for rounding to whole tokens
    draw_thing(canvas, replace(thing, x=thing.x * scale_x / scale, y=thing.y * scale_y / scale), scale, number)


def _label_letters(thing: Thing, picture: Picture, grid: Grid, letters: Tensor) -> None:
    for character, x in _letter_middles(thing):
        column = int(x / picture.extent[0] * grid[1] * COLUMNS_PER_CELL) % COLUMNS_PER_CELL
        letters[_cell(x, thing.y, picture, grid), column] = 1 + LETTERS.index(character)


def _letter_middles(thing: Thing) -> Iterator[tuple[str, float]]:
    """Letters of a sign, and the x of their middles."""
    face = font(thing.font, 64)
    ends = [face.getlength(thing.text[:index]) for index in range(len(thing.text) + 1)]
    for character, left, right in zip(thing.text, ends, ends[1:], strict=False):
        middle = (left + right) / 2 / ends[-1]
        yield character, thing.x + (middle - 0.5) * thing.size * thing.aspect


def _cell(x: float, y: float, picture: Picture, grid: Grid) -> int:
    across, down = picture.extent
    column = min(grid[1] - 1, max(0, int(x / across * grid[1])))
    row = min(grid[0] - 1, max(0, int(y / down * grid[0])))
    return row * grid[1] + column
