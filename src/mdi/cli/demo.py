"""A first look: the bundled model over three local nodes answers questions about sample images. Needs no network.

The samples are the first held-out ones of every skill (training/sample_images.py): the model has never seen them.
"""

from __future__ import annotations

import json
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
from PIL import Image, ImageDraw, ImageFont, ImageOps
from rich.console import Console
from rich.table import Table

from mdi.checkpoint.bundled import BUNDLED
from mdi.core.errors import ConfigError
from mdi.core.sampling import SamplingParams
from mdi.engine import Engine
from mdi.rpc.tls import encryption_enabled

N_NODES = 3
PARAMS = SamplingParams(temperature=0, max_tokens=64)
SAMPLES = Path(__file__).parents[1] / "assets" / "samples"
SHEET = "answers.png"
N_COLUMNS, CARD, MARGIN = 4, (380, 340), 12  # of the contact sheet; pixels
PICTURE_HEIGHT, FILM_FRAMES = 220, 4
LETTERS_PER_LINE = 46
INK, RIGHT, WRONG, PAPER = "#222222", "#1a7f37", "#c62828", "#ffffff"


@dataclass(frozen=True)
class Sample:
    """A question about one image, two, or a video."""

    question: str
    truth: str
    media: tuple[Path, ...]

    def messages(self) -> list[dict[str, Any]]:
        """As the chat form has it."""
        kinds = [("video" if path.suffix == ".mp4" else "image", path) for path in self.media]
        parts: list[dict[str, Any]] = [{"type": kind, kind: str(path)} for kind, path in kinds]
        return [{"role": "user", "content": [*parts, {"type": "text", "text": self.question}]}]


@dataclass(frozen=True)
class Answered:
    sample: Sample
    text: str
    seconds: float

    @property
    def right(self) -> bool:
        return self.text == self.sample.truth


def run(out: Console, folder: Path) -> None:
    """Asks about the samples, and prints questions, answers, times and what each node holds.

    Writes the pictures and the answers as one image into `folder`. Raises ConfigError where that is impossible.
    """
    _check_writable(folder)
    started = time.perf_counter()
    with Engine(BUNDLED, n_nodes=N_NODES, encryption=encryption_enabled()) as engine:
        out.print(f"{N_NODES} nodes with one model between them, started in {time.perf_counter() - started:.1f} s\n")
        answers = [_ask(engine, sample) for sample in samples()]
        nodes = Table("node", "layers", "process", "memory")
        for node in engine.nodes():
            layers = f"{node.first_layer}-{node.last_layer - 1}"
            nodes.add_row(node.name, layers, str(node.pid), f"{node.resident_bytes / 1e6:,.0f} MB")
    table = Table("question", "answer", "truth", "seconds")
    for answer in answers:
        color = "green" if answer.right else "red"
        table.add_row(
            answer.sample.question, f"[{color}]{answer.text}[/]", answer.sample.truth, f"{answer.seconds:.2f}"
        )
    out.print(table)
    n_right = sum(answer.right for answer in answers)
    out.print(f"{n_right} of {len(answers)} answers are right; the model has 5 million parameters.\n")
    out.print(nodes)
    contact_sheet(answers).save(folder / SHEET)
    out.print(f"\nThe pictures and the answers: {folder / SHEET}", soft_wrap=True, highlight=False)
    out.print('With a real model: mdi ask Qwen/Qwen2-VL-2B-Instruct "What is this?" --image cat.jpg')


def samples() -> list[Sample]:
    """What ships with the package."""
    entries = json.loads((SAMPLES / "samples.json").read_text(encoding="utf-8"))
    return [
        Sample(entry["question"], entry["truth"], tuple(SAMPLES / name for name in entry["media"])) for entry in entries
    ]


def contact_sheet(answers: Sequence[Answered]) -> Image.Image:
    """One image with a card for each question: its pictures, the question, the answer, and the truth if it differs."""
    n_rows = -(-len(answers) // N_COLUMNS)
    width, height = CARD
    sheet = Image.new("RGB", (N_COLUMNS * width, n_rows * height), PAPER)
    for index, answer in enumerate(answers):
        sheet.paste(_card(answer), (index % N_COLUMNS * width, index // N_COLUMNS * height))
    return sheet


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SHEET).open("ab").close()
    except OSError as error:
        raise ConfigError(
            f"{str(folder / SHEET)!r} cannot be written ({error.strerror}): choose another --out"
        ) from None


def _ask(engine: Engine, sample: Sample) -> Answered:
    started = time.perf_counter()
    completion = engine.chat(sample.messages(), PARAMS)
    return Answered(sample, completion.text, time.perf_counter() - started)


def _card(answer: Answered) -> Image.Image:
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
    return [frames[round(index * (len(frames) - 1) / (FILM_FRAMES - 1))] for index in range(FILM_FRAMES)]
