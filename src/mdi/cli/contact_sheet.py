"""The contact sheet of `mdi demo`: one image with a card for each question, its pictures and its answer."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import av
from PIL import Image, ImageDraw, ImageFont, ImageOps

from mdi.cli.sample_questions import AnsweredQuestion

N_COLUMNS, CARD, MARGIN = 4, (380, 340), 12  # pixels
PICTURE_HEIGHT, VIDEO_FRAMES = 220, 4
LETTERS_PER_LINE = 46
INK, RIGHT, WRONG, PAPER = "#222222", "#1a7f37", "#c62828", "#ffffff"


def contact_sheet(answers: Sequence[AnsweredQuestion]) -> Image.Image:
    """A card for each question: its pictures, the question, the answer, and the truth where it differs."""
    n_rows = -(-len(answers) // N_COLUMNS)
    width, height = CARD
    sheet = Image.new("RGB", (N_COLUMNS * width, n_rows * height), PAPER)
    for index, answer in enumerate(answers):
        sheet.paste(_card(answer), (index % N_COLUMNS * width, index // N_COLUMNS * height))
    return sheet


def _card(answer: AnsweredQuestion) -> Image.Image:
    card = Image.new("RGB", CARD, PAPER)
    pictures = [picture for path in answer.sample.media for picture in _pictures(path)]
    n_columns = min(2, len(pictures))
    n_rows = len(pictures) // n_columns
    width, height = (CARD[0] - 2 * MARGIN) // n_columns, PICTURE_HEIGHT // n_rows
    for index, picture in enumerate(pictures):
        fitted = ImageOps.pad(picture, (width - 4, height - 4), color=PAPER)
        card.paste(fitted, (MARGIN + index % n_columns * width, MARGIN + index // n_columns * height))
    draw, y = ImageDraw.Draw(card), PICTURE_HEIGHT + 2 * MARGIN
    lines = [(answer.sample.question, INK), (answer.text, RIGHT if answer.right else WRONG)]
    if not answer.right:
        lines.append((f"(truth: {answer.sample.truth})", INK))
    font = ImageFont.load_default(15)
    for text, color in lines:
        wrapped = textwrap.fill(text, LETTERS_PER_LINE)
        draw.multiline_text((MARGIN, y), wrapped, fill=color, font=font)
        y += 20 * (wrapped.count("\n") + 1)
    return card


def _pictures(path: Path) -> list[Image.Image]:
    """The image, or some frames of the video."""
    if path.suffix != ".mp4":
        return [Image.open(path).convert("RGB")]
    with av.open(str(path)) as container:
        frames = [Image.fromarray(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    return [frames[round(index * (len(frames) - 1) / (VIDEO_FRAMES - 1))] for index in range(VIDEO_FRAMES)]
