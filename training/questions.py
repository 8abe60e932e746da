"""Questions about a scene, in several wordings each, with their true answers.

Knows what a scene holds and how English asks for it; nothing of pixels, tokens or models.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from random import Random

from training.scenes import COLORS, SHAPES, Look, Picture, Scene, Thing
from training.unknown import UNKNOWN, strange_question

STRANGE_SHARE = 0.03  # of the questions in training
MARGIN = 0.14  # things nearer than this along an axis, in shorter sides of the picture, have no clear order


Looks = frozenset[Look]


@dataclass(frozen=True)
class Piece:
    """A part of an answer. weight: share of the loss that its tokens get; 1 counts as what the model chooses.

    about: look of the thing that it names.
    """

    text: str
    weight: float = 1.0
    about: Look | None = None


@dataclass(frozen=True)
class Question:
    """skill: what it takes to answer; the name under which accuracy is reported.

    about: looks of the things that the answer is about; other: those they are compared with; None: not known.
    nth: the only picture that is asked about. pieces: the answer in parts, where they do not weigh the same.
    apart: each part is tokenized on its own, as where a schema forbids the token that would reach into the next.
    """

    skill: str
    text: str
    answer: str
    about: Looks | None = None
    other: Looks | None = None
    nth: int | None = None
    pieces: tuple[Piece, ...] = ()
    apart: bool = False

    @property
    def texts(self) -> tuple[str, ...]:
        """The answer, as it is tokenized."""
        return tuple(piece.text for piece in self.pieces) if self.apart else (self.answer,)


# For each thing one can ask: wordings for training, and, behind them, wordings for held-out scenes only.
WORDINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "shape": (
        (
            "What shape is {the}?",
            "Which shape is {the}?",
            "What is {the}?",
            "What is the shape of {the}?",
            "What kind of shape is {the}?",
            "What does {the} look like?",
            "Name the shape of {the}.",
            "Say which shape {the} has.",
            "Which sort of shape is {the}?",
            "Tell me which shape {the} is.",
        ),
        ("Which kind of shape is {the}?", "Tell me the shape of {the}."),
    ),
    "only_shape": (
        (
            "What shape is in the image?",
            "What shape is this?",
            "What shape is present?",
            "Which shape is shown?",
            "What shape does the image contain?",
            "What is shown in the picture?",
            "What do you see?",
            "Which shape can you see?",
            "Name the shape.",
        ),
        ("What shape do you see in the picture?", "Which shape does the picture contain?"),
    ),
    "color": (
        (
            "What color is {the}?",
            "Which color is {the}?",
            "What is the color of {the}?",
            "What color does {the} have?",
            "Which color has {the}?",
            "Name the color of {the}.",
            "What colour is {the}?",
            "Say which color {the} is.",
            "Tell me which color {the} has.",
        ),
        ("Which color does {the} have?", "Tell me the color of {the}."),
    ),
    "background": (
        ("Is the background dark or light?", "Is the background light or dark?"),
        ("Is it a dark or a light background?",),
    ),
    "exists": (
        (
            "Is there {a}?",
            "Is there {a} in the image?",
            "Is {a} present?",
            "Does the image contain {a}?",
            "Can you see {a}?",
            "Do you see {a}?",
            "Does the picture show {a}?",
            "Is {a} shown?",
            "Is {a} in the image?",
            "Can you find {a} in the picture?",
        ),
        ("Is {a} in the picture?", "Can you see {a} in the image?"),
    ),
    "absent": (
        (
            "Is there no {thing}?",
            "Is there not {a}?",
            "Is there not {a} in the image?",
            "Is no {thing} present?",
            "Does the image not contain {a}?",
        ),
        ("Is there no {thing} in the image?",),
    ),
    "count": (
        (
            "How many {things} are there?",
            "How many {things} are in the image?",
            "How many {things} do you see?",
            "How many {things} can you see?",
            "How many {things} are shown?",
            "Count the {things}.",
            "What is the number of {things}?",
            "How many {things}?",
            "Say how many {things} there are.",
            "How many {things} does the picture show?",
            "How many {things} does this image have?",
            "How many {things} are there in the picture?",
        ),
        ("How many {things} are in the picture?", "How many {things} does the image contain?"),
    ),
    "side": (
        (
            "Is {the} on the left or on the right?",
            "Is {the} on the right or on the left?",
            "On which side is {the}, left or right?",
            "Is {the} left or right?",
            "Is {the} in the left or the right half?",
        ),
        ("Which side is {the} on, left or right?",),
    ),
    "level": (
        (
            "Is {the} at the top or at the bottom?",
            "Is {the} at the bottom or at the top?",
            "Is {the} in the top or the bottom half?",
            "Is {the} top or bottom?",
            "Is {the} near the top or near the bottom?",
        ),
        ("Where is {the}, at the top or at the bottom?",),
    ),
    "relation": (
        (
            "Where is {the} relative to {b}?",
            "Where is {the}, seen from {b}?",
            "On which side of {b} is {the}?",
            "Where is {the} compared to {b}?",
            "In which direction from {b} is {the}?",
            "Looking from {b}, where is {the}?",
            "Relative to {b}, where is {the}?",
            "As seen from {b}, where is {the}?",
            "With respect to {b}, on which side is {the}?",
        ),
        ("Seen from {b}, where is {the}?",),
    ),
    "horizontal": (
        (
            "Is {the} left or right of {b}?",
            "Is {the} to the left or to the right of {b}?",
            "Is {the} right or left of {b}?",
        ),
        ("Is {the} to the right or to the left of {b}?",),
    ),
    "vertical": (
        (
            "Is {the} above or below {b}?",
            "Is {the} below or above {b}?",
            "Is {the} placed above or below {b}?",
        ),
        ("Is {the} placed below or above {b}?",),
    ),
    "check": (
        (
            "Is {the} {side} {b}?",
            "Is it true that {the} is {side} {b}?",
            "Does {the} lie {side} {b}?",
            "Do you see {the} {side} {b}?",
            "Can one see {the} {side} {b}?",
            "Can you tell me whether {the} is {side} {b}?",
            "Is {the} {side} {b} or not?",
            "Is {the} seen {side} {b}?",
        ),
        ("Can you see {the} {side} {b}?",),
    ),
    "neighbour": (
        (
            "What is {side} {b}?",
            "Which shape is {side} {b}?",
            "What shape is {side} {b}?",
            "What lies {side} {b}?",
            "What do you see {side} {b}?",
            "Which shape can you see {side} {b}?",
            "Which shape do you see {side} {b}?",
        ),
        ("Which shape lies {side} {b}?",),
    ),
    "read": (
        (
            "What does the text say?",
            "What does it say?",
            "Read the text.",
            "What is written in the image?",
            "What is written here?",
            "What text is shown?",
            "What does the sign say?",
            "Which text do you see?",
            "What is the text?",
            "Which text do you see in the picture?",
            "What text can you see in the image?",
            "What text is in the image?",
            "What text does the picture show?",
            "What words do you see in the image?",
            "What does the text in the image say?",
            "What do the letters in the picture say?",
            "Read what is written in the picture.",
        ),
        ("What text do you see in the image?", "What does the text in the picture say?"),
    ),
    "word": (
        ("Which word is shown?", "What word is this?", "Read the word.", "What word do you see?"),
        ("Which word do you see?",),
    ),
    "number": (
        ("Which number is shown?", "What number is this?", "Read the number.", "What number do you see?"),
        ("Which number do you see?",),
    ),
    "line": (
        (
            "What is the text at the {level}?",
            "What is written at the {level}?",
            "Read the text at the {level}.",
            "What does the text at the {level} say?",
            "What does it say at the {level}?",
            "Which text is at the {level}?",
            "What text do you see at the {level}?",
        ),
        ("What text is at the {level}?",),
    ),
    "describe": (
        (
            "Describe the image.",
            "Describe the picture.",
            "What is in the image?",
            "Describe what you see.",
            "What can you see in the picture?",
            "Describe this image in one sentence.",
            "Give a short description.",
            "Describe the picture in one sentence.",
            "Describe this image.",
            "What things do you see in the image?",
        ),
        ("Describe this picture.", "Describe the image in one sentence."),
    ),
    "same": (
        (
            "Are the two images the same?",
            "Do both images show the same?",
            "Are both pictures the same?",
            "Do the images show the same things?",
            "Are the pictures the same?",
            "Is it the same image twice?",
        ),
        ("Are both images the same?",),
    ),
    "same_shape": (
        (
            "Do both images show the same shape?",
            "Is the shape the same in both images?",
            "Are the two shapes the same?",
            "Is it the same shape in both pictures?",
            "Is it the same shape in the two images?",
            "Is the shape in both images the same?",
        ),
        ("Is it the same shape in both images?",),
    ),
    "same_color": (
        (
            "Do both shapes have the same color?",
            "Is the color the same in both images?",
            "Are the two shapes of the same color?",
            "Is it the same color in both pictures?",
            "Is it the same color in the two images?",
            "Is the color in both images the same?",
        ),
        ("Is it the same color in both images?",),
    ),
    "changed": (
        (
            "What changed?",
            "What is different?",
            "What changed between the images?",
            "What is the difference?",
            "What is different in the second image?",
            "What is different between the pictures?",
            "What is the difference between the images?",
            "What differs between the images?",
        ),
        ("What is different between the images?",),
    ),
    "more": (
        (
            "Which image has more {things}?",
            "Which image shows more {things}?",
            "In which image are more {things}?",
            "Which picture has more {things}?",
            "Which of the pictures shows more {things}?",
        ),
        ("Which picture shows more {things}?",),
    ),
    "which": (
        ("Which image shows {a}?", "Which image contains {a}?", "In which image is {a}?", "Which picture has {a}?"),
        ("Which picture shows {a}?",),
    ),
    "of_pair": (
        (
            "{question} Look at the {nth} image.",
            "In the {nth} image: {question}",
            "Look at the {nth} image. {question}",
            "In the {nth} of the pictures: {question}",
            "The {nth} picture: {question}",
        ),
        ("In the {nth} picture: {question}",),
    ),
    "direction": (
        (
            "Which way does {the} move?",
            "In which direction does {the} move?",
            "Where does {the} move?",
            "Where does {the} go?",
            "Which direction does {the} move in?",
        ),
        ("Which way does {the} go?",),
    ),
    "mover": (
        ("What moves?", "Which shape moves?", "What is moving?", "Which shape is moving?"),
        ("What shape moves?",),
    ),
    "mover_color": (
        (
            "What color is the moving shape?",
            "What is the color of the moving shape?",
            "Which color does the shape that moves have?",
        ),
        ("Which color is the moving shape?",),
    ),
    "moves": (("Does {the} move?", "Is {the} moving?"), ("Does {the} move in the video?",)),
    "appears": (
        (
            "What appears?",
            "Which shape appears?",
            "What shape appears?",
            "What shows up?",
            "What appears in the video?",
        ),
        ("Which shape appears in the video?",),
    ),
    "appears_color": (
        ("What color is the shape that appears?", "What is the color of the shape that appears?"),
        ("Which color is the shape that appears?",),
    ),
    "vanishes": (
        (
            "What disappears?",
            "Which shape disappears?",
            "What shape disappears?",
            "What goes away?",
            "What disappears in the video?",
            "Which of the shapes disappears in the video?",
            "What shape disappears in the video?",
        ),
        ("Which shape disappears in the video?",),
    ),
    "anything": (
        (
            "Does anything appear?",
            "Does a shape appear?",
            "Does anything appear in the video?",
            "Does something appear in the video?",
            "Is there a shape that appears in the video?",
            "Does any shape appear in the video?",
            "Does a new shape appear?",
            "Does a shape show up in the video?",
        ),
        ("Does a shape appear in the video?",),
    ),
    "anything_gone": (
        (
            "Does anything disappear?",
            "Does a shape disappear?",
            "Does a shape disappear in the video?",
            "Does something go away?",
        ),
        ("Does anything disappear in the video?",),
    ),
}
SKILL = {
    "only_shape": "shape", "side": "position", "level": "position", "relation": "position", "horizontal": "position",
    "vertical": "position", "check": "position", "neighbour": "position", "word": "read", "number": "read",
    "line": "read", "same": "compare", "same_shape": "compare", "same_color": "compare", "changed": "compare",
    "more": "compare", "which": "compare", "of_pair": "compare", "direction": "motion", "mover": "motion",
    "mover_color": "motion", "moves": "motion", "appears": "change", "appears_color": "change",
    "vanishes": "change", "anything": "change", "anything_gone": "change", "absent": "exists", "background": "color",
}  # fmt: skip
SKILLS = ("shape", "color", "exists", "count", "position", "read", "describe", "compare", "motion", "change")
PLURALS = {"cross": "crosses", "shape": "shapes"}


class Asker:
    """Asks about scenes. `held_out` words every question as training never does."""

    def __init__(self, random: Random, held_out: bool = False) -> None:
        self._random = random
        self._held_out = held_out

    def questions(self, scene: Scene, count: int) -> list[Question]:
        """Up to `count` different questions about a scene, the kinds evenly mixed."""
        kinds = list(_KINDS[scene.skill])
        asked: dict[str, Question] = {}
        for _ in range(count * 3):
            if len(asked) == count:
                break
            weights = [weight for _, weight in kinds]
            strange = self._random.random() < STRANGE_SHARE and not self._held_out
            ask = Asker.strange if strange else self._random.choices([ask for ask, _ in kinds], weights)[0]
            question = ask(self, scene)
            if question is not None:
                asked.setdefault(question.text, question)
        return list(asked.values())

    def _word(
        self, kind: str, answer: str, about: Iterable[Thing] = (), other: Iterable[Thing] | None = None, **names: str
    ) -> Question:
        text = self._random.choice(WORDINGS[kind][self._held_out]).format(**names)
        others = None if other is None else _looks(other)
        return Question(SKILL.get(kind, kind), self._style(text), answer, _looks(about), others)

    def _style(self, text: str) -> str:
        """People write in lower case and forget the question mark."""
        draw = self._random.random()
        if draw < 0.15:
            text = text[0].lower() + text[1:]
        if 0.1 < draw < 0.2:
            text = text.rstrip("?.")
        return text

    def strange(self, _scene: Scene) -> Question:
        """What no picture answers."""
        return Question("strange", strange_question(self._random), UNKNOWN)

    # Shapes, colours, presence

    def shape(self, scene: Scene) -> Question | None:
        return self._shape_in(scene.fullest)

    def _shape_in(self, picture: Picture) -> Question | None:
        shapes = shapes_of(picture)
        if len(shapes) == 1 and self._random.random() < 0.6:
            return self._word("only_shape", shapes[0].kind, shapes)
        colors = Counter(thing.color for thing in shapes)
        unique = [thing for thing in shapes if colors[thing.color] == 1]
        if not unique:
            return None
        thing = self._random.choice(unique)
        noun = self._random.choice(("shape", "shape", "thing"))
        return self._word("shape", thing.kind, [thing], the=f"the {thing.color} {noun}")

    def color(self, scene: Scene) -> Question | None:
        return self._color_in(scene.fullest)

    def _color_in(self, picture: Picture) -> Question | None:
        shapes = shapes_of(picture)
        texts = [thing for thing in picture.things if thing.kind == "text"]
        if texts and (not shapes or self._random.random() < 0.2):
            return self._word("color", texts[0].color, texts, the="the text") if len(texts) == 1 else None
        if len(shapes) == 1 and self._random.random() < 0.5:
            return self._word("color", shapes[0].color, shapes, the="the shape")
        kinds = Counter(thing.kind for thing in shapes)
        unique = [kind for kind in kinds if len({thing.color for thing in shapes if thing.kind == kind}) == 1]
        if not unique:
            return None
        kind = self._random.choice(unique)
        about = [thing for thing in shapes if thing.kind == kind]
        return self._word(
            "color", about[0].color, about, the=f"the {kind}" if kinds[kind] == 1 else f"the {plural(kind)}"
        )

    def exists(self, scene: Scene) -> Question | None:
        return self._exists_in(scene.pictures[0])

    def _exists_in(self, picture: Picture) -> Question | None:
        r = self._random
        looks = {(thing.kind, thing.color) for thing in shapes_of(picture)}
        form = r.choice(("kind", "color", "both"))
        want = r.random() < 0.5
        if want and looks:
            kind, color = r.choice(sorted(looks))
        elif looks and form == "both" and r.random() < 0.6:  # nearly right
            kind, color = r.choice(sorted(looks))
            kind, color = (r.choice(SHAPES), color) if r.random() < 0.5 else (kind, r.choice(tuple(COLORS)))
        else:
            kind, color = r.choice(SHAPES), r.choice(tuple(COLORS))
        name = {"kind": kind, "color": f"{color} {r.choice(('shape', 'shape', 'thing'))}", "both": f"{color} {kind}"}[
            form
        ]
        found = [
            thing
            for thing in shapes_of(picture)
            if form == "color" or thing.kind == kind
            if form == "kind" or thing.color == color
        ]
        if r.random() < 0.3:
            return self._word("absent", _yes(not found), found, a=_a(name), thing=name)
        return self._word("exists", _yes(bool(found)), found, a=_a(name))

    # Counting

    def count(self, scene: Scene) -> Question | None:
        return self._count_in(scene.pictures[0])

    def _count_in(self, picture: Picture) -> Question | None:
        name, counted = self._countable(shapes_of(picture))
        return self._word("count", str(len(counted)), counted, things=name)

    def _countable(self, shapes: Sequence[Thing]) -> tuple[str, list[Thing]]:
        r = self._random
        form = r.choice(("all", "kind", "kind", "color", "both"))
        if shapes and r.random() < 0.93:
            model = r.choice(list(shapes))
            kind, color = model.kind, model.color
        else:
            kind, color = r.choice(SHAPES), r.choice(tuple(COLORS))
        if form == "all":
            return "shapes", list(shapes)
        if form == "kind":
            return plural(kind), [thing for thing in shapes if thing.kind == kind]
        if form == "color":
            return f"{color} shapes", [thing for thing in shapes if thing.color == color]
        both = [thing for thing in shapes if (thing.kind, thing.color) == (kind, color)]
        return f"{color} {plural(kind)}", both

    # Places

    def place(self, scene: Scene) -> Question | None:
        """Where one thing is in the picture."""
        picture = scene.pictures[0]
        named = self.named(picture)
        if not named:
            return None
        name, thing = self._random.choice(named)
        width, height = picture.extent
        if self._random.random() < 0.5:
            x = thing.x / width
            return None if 0.43 < x < 0.57 else self._word("side", "left" if x < 0.5 else "right", [thing], the=name)
        y = thing.y / height
        return None if 0.43 < y < 0.57 else self._word("level", "top" if y < 0.5 else "bottom", [thing], the=name)

    def relation(self, scene: Scene) -> Question | None:
        """Where one thing is, seen from another."""
        r = self._random
        named = self.named(scene.pictures[0])
        if len(named) < 2:
            return None
        (name, thing), (other_name, other) = r.sample(named, 2)
        dx, dy = thing.x - other.x, thing.y - other.y
        across, down = ("left" if dx < 0 else "right"), ("above" if dy < 0 else "below")
        form = r.choice(("relation", "horizontal", "vertical", "check", "neighbour"))
        if form == "relation":
            if max(abs(dx), abs(dy)) < MARGIN or not (abs(dx) > 1.5 * abs(dy) or abs(dy) > 1.5 * abs(dx)):
                return None
            return self._word(
                "relation", across if abs(dx) > abs(dy) else down, [thing], [other], the=name, b=other_name
            )
        if form == "horizontal":
            return self._word(form, across, [thing], [other], the=name, b=other_name) if abs(dx) > MARGIN else None
        if form == "vertical":
            return self._word(form, down, [thing], [other], the=name, b=other_name) if abs(dy) > MARGIN else None
        true = [side for side, far in ((across, abs(dx)), (down, abs(dy))) if far > MARGIN]
        if not true:
            return None
        side = r.choice(true)
        if form == "neighbour":
            if len(scene.pictures[0].things) != 2 or thing.kind == "text":
                return None
            return self._word(form, thing.kind, [thing], [other], side=_side(side, r), b=other_name)
        if r.random() < 0.5:
            side = {"left": "right", "right": "left", "above": "below", "below": "above"}[side]
            return self._word("check", "no", [thing], [other], the=name, b=other_name, side=_side(side, r))
        return self._word("check", "yes", [thing], [other], the=name, b=other_name, side=_side(side, r))

    def named(self, picture: Picture) -> list[tuple[str, Thing]]:
        """Things that one can speak of without doubt, with a name for each."""
        shapes = shapes_of(picture)
        kinds, colors = Counter(t.kind for t in shapes), Counter(t.color for t in shapes)
        looks = Counter((t.kind, t.color) for t in shapes)
        named = []
        for thing in shapes:
            names = [f"the {thing.color} {thing.kind}"] if looks[thing.kind, thing.color] == 1 else []
            names += [f"the {thing.kind}"] * 2 if kinds[thing.kind] == 1 else []
            names += [f"the {thing.color} shape"] if colors[thing.color] == 1 else []
            names += ["the shape"] * 2 if len(shapes) == 1 else []
            if names:
                named.append((self._random.choice(names), thing))
        texts = [thing for thing in picture.things if thing.kind == "text"]
        if len(texts) == 1:
            named.append(("the text", texts[0]))
        return named

    # Reading

    def read(self, scene: Scene) -> Question | None:
        lines = sorted((t for t in scene.pictures[0].things if t.kind == "text"), key=lambda thing: thing.y)
        if not lines:
            return None
        if len(lines) == 1:
            text = lines[0].text
            kind = "number" if text.isdigit() else "word"
            return self._word(self._random.choice(("read", "read", kind)), text, lines)
        if len(lines) > 2 or lines[1].y - lines[0].y < MARGIN:
            return None
        level = self._random.randrange(2)
        return self._word("line", lines[level].text, [lines[level]], level=("top", "bottom")[level])

    # Sentences

    def describe(self, scene: Scene) -> Question | None:
        sentence = _sentence(scene.pictures[0])
        return self._word("describe", sentence, scene.pictures[0].things) if sentence else None

    # Two images

    def compare(self, scene: Scene) -> Question | None:
        r = self._random
        first, second = (shapes_of(picture) for picture in scene.pictures)
        looks = [Counter((t.kind, t.color) for t in shapes) for shapes in (first, second)]
        form = r.choice(("same", "shape", "color", "changed", "more", "which", "which", "nth", "nth"))
        if form == "same":
            return self._word("same", _yes(looks[0] == looks[1]), (*first, *second))
        if form in ("shape", "color", "changed"):
            if len(first) != 1 or len(second) != 1:
                return None
            a, b = first[0], second[0]
            if form == "shape":
                return self._word("same_shape", _yes(a.kind == b.kind), (a, b))
            if form == "color":
                return self._word("same_color", _yes(a.color == b.color), (a, b))
            if scene.change not in ("color", "shape", "nothing"):
                return None
            return self._word("changed", scene.change, (a, b))
        if form == "more":
            kind = r.choice((*{t.kind for t in (*first, *second)}, "shape", "shape"))
            counted = [[t for t in shapes if kind in ("shape", t.kind)] for shapes in (first, second)]
            if len(counted[0]) == len(counted[1]):
                return None
            more = "first" if len(counted[0]) > len(counted[1]) else "second"
            return self._word("more", more, (*counted[0], *counted[1]), things=plural(kind))
        if form == "which":
            only = [set(looks[0]) - set(looks[1]), set(looks[1]) - set(looks[0])]
            side = r.randrange(2)
            if not only[side]:
                return None
            kind, color = r.choice(sorted(only[side]))
            name = f"{color} {kind}"
            if r.random() < 0.5 and all(kind != k for k, _ in looks[1 - side]):
                name = kind
            elif r.random() < 0.5 and all(color != c for _, c in looks[1 - side]):
                name = f"{color} shape"
            shown = [t for t in (first, second)[side] if (t.kind, t.color) == (kind, color)]
            return self._word("which", ("first", "second")[side], shown, a=_a(name))
        nth = r.randrange(2)
        ask = r.choice((self._shape_in, self._color_in, self._count_in, self._exists_in))
        question = ask(scene.pictures[nth])
        if question is None:
            return None
        asked = self._word("of_pair", question.answer, question=question.text, nth=("first", "second")[nth])
        return replace(asked, about=question.about, nth=nth)

    # Films

    def film(self, scene: Scene) -> Question | None:
        r = self._random
        named = self.named(scene.fullest)
        mover = scene.mover
        forms = ["anything"]
        if mover:
            forms += ["direction"] * 4 + ["mover", "mover_color", "moves"]
        if scene.appearing:
            forms += ["appears"] * 3 + ["appears_color"] * 2
        if scene.vanishing:
            forms += ["vanishes"] * 3
        if not mover:
            forms.append("moves")
        if not self._held_out:  # the exam is older
            forms.append("anything_gone")
        form = r.choice(forms)
        if form == "anything_gone":
            return self._word(form, _yes(scene.vanishing is not None), filter(None, [scene.vanishing]))
        if form == "anything":
            return self._word("anything", _yes(scene.appearing is not None), filter(None, [scene.appearing]))
        if form == "appears" and scene.appearing:
            return self._word("appears", scene.appearing.kind, [scene.appearing])
        if form == "appears_color" and scene.appearing:
            return self._word("appears_color", scene.appearing.color, [scene.appearing])
        if form == "vanishes" and scene.vanishing:
            return self._word("vanishes", scene.vanishing.kind, [scene.vanishing])
        if form == "mover" and mover:
            return self._word("mover", mover.kind, [mover])
        if form == "mover_color" and mover:
            return self._word("mover_color", mover.color, [mover])
        if form == "direction" and mover:
            names = [name for name, thing in named if (thing.kind, thing.color) == (mover.kind, mover.color)]
            name = r.choice([*names, "the shape" if len(named) == 1 else "the moving shape"])
            return self._word("direction", scene.direction, [mover], the=name)
        if not named:
            return None
        name, thing = r.choice(named)
        is_mover = mover is not None and (thing.kind, thing.color) == (mover.kind, mover.color)
        return self._word("moves", _yes(is_mover), [thing], the=name)


_Ask = Callable[[Asker, Scene], Question | None]
_KINDS: dict[str, tuple[tuple[_Ask, int], ...]] = {
    "still": (
        (Asker.shape, 1), (Asker.color, 1), (Asker.exists, 2), (Asker.count, 4), (Asker.place, 1),
        (Asker.relation, 4), (Asker.describe, 5), (Asker.read, 2),
    ),
    "text": ((Asker.read, 6), (Asker.color, 1), (Asker.describe, 1), (Asker.place, 1)),
    "pair": ((Asker.compare, 1),),
    "film": ((Asker.film, 6), (Asker.color, 1), (Asker.shape, 1)),
}  # fmt: skip


def _looks(things: Iterable[Thing]) -> Looks:
    return frozenset(thing.look for thing in things)


def shapes_of(picture: Picture) -> list[Thing]:
    return [thing for thing in picture.things if thing.kind != "text"]


def in_reading_order(picture: Picture) -> list[Thing] | None:
    """Everything in the picture from left to right; None where there is too much, or no clear order."""
    things = sorted(picture.things, key=lambda thing: thing.x)
    if not 1 <= len(things) <= 4 or any(b.x - a.x < MARGIN / 2 for a, b in pairwise(things)):
        return None
    return things


def _sentence(picture: Picture) -> str | None:
    names = [
        f"the text {thing.text}" if thing.kind == "text" else _a(f"{thing.color} {thing.kind}")
        for thing in in_reading_order(picture) or ()
    ]
    if not names:
        return None
    listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    return listed[0].upper() + listed[1:] + "."


def plural(kind: str) -> str:
    return PLURALS.get(kind, kind + "s")


def _a(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _yes(true: bool) -> str:
    return "yes" if true else "no"


def _side(side: str, random: Random) -> str:
    if side in ("above", "below"):
        return side
    return random.choice((f"{side} of", f"to the {side} of"))
