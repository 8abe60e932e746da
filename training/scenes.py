"""Pictures with known content: shapes, colours, counts, words, pairs and short films, drawn from a seed.

Knows what is in a picture and how to draw it; nothing of questions, tokens or models.
"""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

import numpy as np
from PIL import Image, ImageDraw

from training.fonts import HELD_OUT, TRAINING, font
from training.words import held_out_words, training_words

SHAPES = ("circle", "rectangle", "triangle", "star", "cross", "heart")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (235, 20, 20),
    "green": (20, 200, 20),
    "blue": (20, 40, 245),
    "yellow": (250, 240, 10),
    "black": (8, 8, 8),
    "gray": (128, 128, 128),
    "teal": (0, 128, 128),
    "brown": (150, 48, 38),
    "orange": (255, 140, 0),
    "purple": (130, 20, 170),
    "pink": (255, 130, 190),
    "white": (252, 252, 252),
}
_SPREAD = {"brown": 6, "black": 6, "white": 4, "gray": 8, "teal": 6, "green": 40}  # how far a tint may stray
LETTERS = string.digits + string.ascii_uppercase
LEGIBLE = 2.5  # contrast of a sign; WCAG asks 3 of large letters
LIGHT, DARK = (
    ("yellow", "orange", "pink", "white", "green"),
    ("red", "blue", "black", "gray", "teal", "brown", "purple"),
)
FACTOR = 28  # pixels to a side of one token


Look = tuple[str, str, str]  # kind, colour, text


@dataclass(frozen=True)
class Thing:
    """A shape, or a line of text, on a canvas whose shorter side is 1. x, y: its centre; size: its height."""

    kind: str
    color: str
    x: float
    y: float
    size: float
    aspect: float = 1.0
    turn: float = 0.0  # degrees
    text: str = ""
    font: str = ""
    tint: tuple[int, int, int] = (0, 0, 0)

    @property
    def look(self) -> Look:
        """What one sees of it, wherever it is."""
        return self.kind, self.color, self.text

    @property
    def reach(self) -> float:
        """Half of the longer side of the box it fills."""
        return self.size * max(1.0, self.aspect) / 2


@dataclass(frozen=True)
class Picture:
    """What one still, or one frame, shows. width, height: pixels of the drawing."""

    width: int
    height: int
    background: Background
    things: tuple[Thing, ...]

    @property
    def extent(self) -> tuple[float, float]:
        """Width and height in units of the shorter side."""
        shorter = min(self.width, self.height)
        return self.width / shorter, self.height / shorter


@dataclass(frozen=True)
class Background:
    color: tuple[int, int, int]
    style: str  # plain, gradient, noise, stripes
    other: tuple[int, int, int]
    seed: int


@dataclass(frozen=True)
class Scene:
    """One sample: a still, two stills, or the frames of a film.

    skill: still, text, pair or film. moving, appearing, vanishing: what a film's things do; direction: of the mover.
    """

    skill: str
    pictures: tuple[Picture, ...]
    mover: Thing | None = None
    direction: str = ""
    appearing: Thing | None = None
    vanishing: Thing | None = None
    change: str = ""

    @property
    def fullest(self) -> Picture:
        """The picture that shows most: in a film, the frame that holds all there is."""
        return max(self.pictures, key=lambda picture: len(picture.things))


class SceneMaker:
    """Draws random scenes. `held_out` uses the typefaces and words that training never shows."""

    def __init__(self, seed: str, held_out: bool = False) -> None:
        self.random = Random(seed)
        self._fonts = HELD_OUT if held_out else TRAINING
        self._words = held_out_words() if held_out else training_words()

    def still(self, width: int, height: int) -> Scene:
        style = self.random.random()
        if style < 0.2:
            return Scene("still", (self._picture(width, height, self._single()),))
        if style < 0.6:
            return Scene("still", (self._picture(width, height, self._few(self.random.choice((2, 2, 3, 3, 4)))),))
        if style < 0.85:
            return Scene("still", (self._picture(width, height, self._crowd()),))
        return Scene("still", (self._picture(width, height, [*self._few(self.random.choice((1, 2))), self._line()]),))

    def text(self, width: int, height: int) -> Scene:
        lines = [self._line()] if self.random.random() < 0.7 else [self._line(), self._line()]
        return Scene("text", (self._picture(width, height, lines),))

    def page(self, width: int, height: int) -> Scene:
        """A picture full of letters, line under line: for learning the alphabet, not for questions."""
        r = self.random
        shorter = min(width, height)
        across, down = width / shorter, height / shorter
        colors = r.choice((LIGHT, DARK, DARK))
        lines, y = [], r.uniform(0.02, 0.08)
        while y < down - 0.2:  # each line's middle in a row of cells of its own
            alphabet = r.choice((string.digits, string.ascii_uppercase, string.ascii_uppercase))
            line = self._written("".join(r.choices(alphabet, k=r.randint(1, 7))), r.uniform(0.18, 0.4), colors)
            size = min(line.size, 0.96 * across / line.aspect, down - y - 0.01)
            half = size * line.aspect / 2
            lines.append(replace(line, size=size, x=r.uniform(half, across - half), y=y + size / 2))
            y += max(0.26, size + r.uniform(0.03, 0.15))
        return Scene("page", (Picture(width, height, self._background(lines), tuple(lines)),))

    def pair(self, width: int, height: int) -> Scene:
        r = self.random
        first = self._picture(
            width, height, self._few(r.choice((1, 1, 2, 2, 3))) if r.random() < 0.8 else self._crowd()
        )
        kind = r.random()
        if kind < 0.2:
            second = replace(first, background=self._background(first.things))
            return Scene("pair", (first, second), change="nothing")
        if kind < 0.55 and len(first.things) == 1:
            change = r.choice(("color", "shape"))
            (thing,) = first.things
            other = self._other(thing, change)
            second = replace(first, things=(other,), background=self._background([other]))
            return Scene("pair", (first, second), change=change)
        second = self._picture(
            width, height, self._few(r.choice((1, 1, 2, 2, 3))) if r.random() < 0.8 else self._crowd()
        )
        return Scene("pair", (first, second), change="different")

    def film(self, width: int, height: int, n_frames: int) -> Scene:
        r = self.random
        base = self._picture(width, height, self._few(r.choice((1, 1, 2, 2, 3)), largest=0.34))
        things = list(base.things)
        what = r.random()
        if what < 0.55:
            return self._moving(base, things, n_frames)
        if what < 0.8:
            return self._appearing(base, things, n_frames, appear=True)
        if what < 0.92:
            return self._appearing(base, things, n_frames, appear=False)
        return Scene("film", (base,) * n_frames)

    def _moving(self, base: Picture, things: list[Thing], n_frames: int) -> Scene:
        r = self.random
        index = r.randrange(len(things))
        direction = r.choice(("left", "right", "up", "down"))
        mover = things[index]
        axis = 0 if direction in ("left", "right") else 1
        room = base.extent[axis]
        travel = r.uniform(0.3, 0.75) * (room - 2 * mover.reach)
        low = r.uniform(mover.reach, room - mover.reach - travel)
        path = [low + travel * step / (n_frames - 1) for step in range(n_frames)]
        if direction in ("left", "up"):
            path.reverse()
        frames = []
        for at in path:
            moved = replace(mover, x=at) if axis == 0 else replace(mover, y=at)
            frames.append(replace(base, things=(*things[:index], *things[index + 1 :], moved)))
        return Scene("film", tuple(frames), mover=mover, direction=direction)

    def _appearing(self, base: Picture, things: list[Thing], n_frames: int, appear: bool) -> Scene:
        r = self.random
        index = r.randrange(len(things))
        others = (*things[:index], *things[index + 1 :])
        switch = r.randint(max(1, n_frames // 4), max(1, n_frames * 3 // 4))
        shown = [(frame >= switch) == appear for frame in range(n_frames)]
        frames = tuple(replace(base, things=(*others, things[index]) if on else others) for on in shown)
        if appear:
            return Scene("film", frames, appearing=things[index])
        return Scene("film", frames, vanishing=things[index])

    def _other(self, thing: Thing, change: str) -> Thing:
        if change == "color":
            color = self.random.choice([name for name in COLORS if name != thing.color])
            return replace(thing, color=color, tint=self._tint(color))
        kind = self.random.choice([name for name in SHAPES if name != thing.kind])
        return replace(thing, kind=kind, aspect=self._aspect(kind))

    def _picture(self, width: int, height: int, things: Sequence[Thing]) -> Picture:
        shorter = min(width, height)
        placed = self._place(things, width / shorter, height / shorter)
        return Picture(width, height, self._background(placed), placed)

    def _place(self, things: Sequence[Thing], width: float, height: float) -> tuple[Thing, ...]:
        """Puts things where they do not touch, largest first; shrinks them all when there is no room."""
        r = self.random
        for scale in (1.0, 0.85, 0.7, 0.6, 0.5, 0.42, 0.35):
            placed: list[Thing] = []
            for thing in sorted(things, key=lambda thing: -thing.reach):
                thing = replace(thing, size=thing.size * scale)
                half_w, half_h = _half_box(thing)
                if 2 * half_w > width or 2 * half_h > height:
                    break
                for _ in range(25):
                    x = r.uniform(half_w, width - half_w)
                    y = r.uniform(half_h, height - half_h)
                    if all(_apart(x, y, half_w, half_h, other) for other in placed):
                        placed.append(replace(thing, x=x, y=y))
                        break
                else:
                    break
            if len(placed) == len(things):
                return tuple(placed)
        return tuple(placed)

    def _single(self) -> list[Thing]:
        return [self._shape(self.random.uniform(0.16, 0.6))]

    def _few(self, count: int, largest: float = 0.5) -> list[Thing]:
        """Shapes that differ from each other in kind or colour."""
        seen: set[tuple[str, str]] = set()
        things: list[Thing] = []
        while len(things) < count:
            thing = self._shape(self.random.uniform(0.16, max(0.2, largest - 0.06 * count)))
            if (thing.kind, thing.color) not in seen:
                seen.add((thing.kind, thing.color))
                things.append(thing)
        return things

    def _crowd(self) -> list[Thing]:
        """Up to eight shapes of one to three looks."""
        r = self.random
        total = r.randint(2, 8)
        looks = [self._shape(1.0) for _ in range(r.choice((1, 2, 2, 3)))]
        if r.random() < 0.3:
            looks = [replace(look, color=looks[0].color, tint=looks[0].tint) for look in looks]
        size = r.uniform(0.16, 0.28)
        return [replace(r.choice(looks), size=size * r.uniform(0.85, 1.15)) for _ in range(total)]

    def _shape(self, size: float) -> Thing:
        r = self.random
        kind = r.choice((*SHAPES, "circle", "rectangle", "triangle"))
        color = r.choice(tuple(COLORS))
        turn = r.uniform(-12, 12) if kind != "circle" and r.random() < 0.3 else 0.0
        return Thing(kind, color, 0.5, 0.5, size, self._aspect(kind), turn, tint=self._tint(color))

    def _aspect(self, kind: str) -> float:
        if kind == "rectangle":
            return self.random.uniform(0.5, 2.0)
        return self.random.uniform(0.9, 1.15) if kind == "triangle" else 1.0

    def _line(self) -> Thing:
        r = self.random
        if r.random() < 0.45:
            text = "".join(r.choices(string.digits, k=r.choice((1, 1, 2, 2, 3, 3, 4))))
        elif r.random() < 0.35 and self._fonts is TRAINING:  # any letters: reading is not guessing
            text = "".join(r.choices(string.ascii_uppercase, k=r.choice((1, 2, 3, 4, 5))))
        else:
            text = r.choice(self._words)
        return self._written(text, r.uniform(0.2, 0.42))

    def _written(self, text: str, size: float, colors: Sequence[str] = tuple(COLORS)) -> Thing:
        """A line of text, no wider than the picture."""
        r = self.random
        name = r.choice(self._fonts)
        left, top, right, bottom = font(name, 64).getbbox(text)
        aspect = (right - left) / max(1, bottom - top)
        color = r.choice(colors)
        return Thing(
            "text", color, 0.5, 0.5, min(size, 0.94 / aspect), aspect, text=text, font=name, tint=self._tint(color)
        )

    def _tint(self, color: str) -> tuple[int, int, int]:
        spread = _SPREAD.get(color, 16)
        r, g, b = (min(255, max(0, level + self.random.randint(-spread, spread))) for level in COLORS[color])
        return r, g, b

    def _background(self, things: Sequence[Thing]) -> Background:
        """A colour far enough from those of the things; plain and light more often than not."""
        r = self.random
        for _ in range(60):
            if r.random() < 0.6:
                color = (r.randint(215, 255), r.randint(215, 255), r.randint(215, 255))
            elif r.random() < 0.5:
                grey = r.randint(0, 255)
                color = tuple(min(255, max(0, grey + r.randint(-20, 20))) for _ in range(3))  # type: ignore[assignment]
            else:
                color = (r.randint(0, 255), r.randint(0, 255), r.randint(0, 255))
            if all(_stands_out(thing, color) for thing in things):
                break
        style = r.choices(("plain", "gradient", "noise", "stripes"), (0.55, 0.2, 0.15, 0.1))[0]
        red, green, blue = (min(255, max(0, level + r.randint(-18, 18))) for level in color)
        return Background(color, style, (red, green, blue), r.randrange(2**31))


def _stands_out(thing: Thing, background: tuple[int, int, int]) -> bool:
    """Signs are lighter or darker than what is behind them, about as much as WCAG asks of large letters."""
    if thing.kind == "text":
        lighter, darker = sorted((_luminance(thing.tint), _luminance(background)), reverse=True)
        return (lighter + 0.05) / (darker + 0.05) > LEGIBLE
    return math.dist(background, COLORS[thing.color]) > 85


def _luminance(color: tuple[int, int, int]) -> float:
    """Relative luminance, 0 to 1 (WCAG 2.2; the gamma is simplified)."""
    red, green, blue = (math.pow(level / 255, 2.2) for level in color)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _half_box(thing: Thing) -> tuple[float, float]:
    width, height = thing.size * thing.aspect / 2, thing.size / 2
    angle = math.radians(abs(thing.turn))
    return (
        width * math.cos(angle) + height * math.sin(angle) + 0.012,
        width * math.sin(angle) + height * math.cos(angle) + 0.012,
    )


def _apart(x: float, y: float, half_w: float, half_h: float, other: Thing) -> bool:
    other_w, other_h = _half_box(other)
    return abs(x - other.x) > half_w + other_w or abs(y - other.y) > half_h + other_h


def draw(picture: Picture, smooth: bool = True) -> Image.Image:
    """The picture as an RGB image; `smooth` draws at a finer scale and averages down."""
    fine = 3 if smooth and max(picture.width, picture.height) < 160 else 2 if smooth else 1
    image = _draw_background(picture.background, picture.width, picture.height)
    if fine > 1:
        image = image.resize((picture.width * fine, picture.height * fine), Image.Resampling.NEAREST)
    canvas = ImageDraw.Draw(image)
    scale = min(image.width, image.height)
    for thing in picture.things:
        draw_thing(canvas, thing, scale, thing.tint)
    return image.reduce(fine) if fine > 1 else image


def draw_thing(canvas: ImageDraw.ImageDraw, thing: Thing, scale: float, fill: tuple[int, int, int] | int) -> None:
    """Draws one thing; scale: pixels of the canvas's shorter side."""
    if thing.kind == "text":
        face = _fitting(thing, scale)
        left, top, right, bottom = face.getbbox(thing.text)
        canvas.text(
            (thing.x * scale - (left + right) / 2, thing.y * scale - (top + bottom) / 2), thing.text, fill, face
        )
        return
    points = _outline(thing)
    if thing.kind == "circle":
        half = thing.size / 2
        box = ((thing.x - half) * scale, (thing.y - half) * scale, (thing.x + half) * scale, (thing.y + half) * scale)
        canvas.ellipse(box, fill)
        return
    canvas.polygon([(x * scale, y * scale) for x, y in points], fill)


def _fitting(thing: Thing, scale: float):  # type: ignore[no-untyped-def]
    _, top, _, bottom = font(thing.font, 64).getbbox(thing.text)
    return font(thing.font, max(6, round(64 * thing.size * scale / max(1, bottom - top))))


def _outline(thing: Thing) -> list[tuple[float, float]]:
    unit = _UNIT_OUTLINES[thing.kind]
    cos, sin = math.cos(math.radians(thing.turn)), math.sin(math.radians(thing.turn))
    points = []
    for x, y in unit:
        x, y = x * thing.size * thing.aspect / 2, y * thing.size / 2
        points.append((thing.x + x * cos - y * sin, thing.y + x * sin + y * cos))
    return points


def _star() -> list[tuple[float, float]]:
    tips = [(math.sin(k * math.pi / 5), -math.cos(k * math.pi / 5)) for k in range(10)]
    return [(x * (1 if k % 2 == 0 else 0.42), y * (1 if k % 2 == 0 else 0.42)) for k, (x, y) in enumerate(tips)]


def _heart() -> list[tuple[float, float]]:
    steps = [k * math.tau / 40 for k in range(40)]
    return [
        (
            math.sin(t) ** 3,
            -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t) + 2.5) / 14.5,
        )
        for t in steps
    ]


_ARM = 0.34
_UNIT_OUTLINES: dict[str, list[tuple[float, float]]] = {
    "circle": [],
    "rectangle": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
    "triangle": [(0, -1), (1, 1), (-1, 1)],
    "star": _star(),
    "cross": [
        (-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM),
        (_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM),
    ],
    "heart": _heart(),
}  # fmt: skip


def _draw_background(background: Background, width: int, height: int) -> Image.Image:
    if background.style == "plain":
        return Image.new("RGB", (width, height), background.color)
    near, far = np.array(background.color, np.float32), np.array(background.other, np.float32)
    generator = np.random.default_rng(background.seed)
    if background.style == "gradient":
        across, down = np.linspace(0, 1, width)[None, :], np.linspace(0, 1, height)[:, None]
        lean = generator.random()
        mix = (across * lean + down * (1 - lean))[..., None]
    elif background.style == "stripes":
        period = generator.integers(6, 30)
        slant = generator.integers(-1, 2)
        lines = np.arange(width)[None, :] + slant * np.arange(height)[:, None]
        mix = ((lines // period) % 2)[..., None].astype(np.float64)
    else:
        mix = generator.random((height, width, 1)) * 1.2
    pixels = near + (far - near) * mix
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
