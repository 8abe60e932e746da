"""Scenes: their descriptions agree with their pixels, and held-out scenes share nothing with training."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import numpy as np
import pytest
from skimage.measure import label
from training.fonts import HELD_OUT, TRAINING
from training.questions import WORDINGS, Asker
from training.scenes import Background, Picture, Scene, SceneMaker, Thing, draw
from training.words import held_out_words, training_words

KINDS = ("still", "text", "pair")
WHITE = Background((255, 255, 255), "plain", (255, 255, 255), 0)


def scenes(kind: str, count: int, held_out: bool = False) -> list[Scene]:
    makers = [SceneMaker(f"test {index}", held_out) for index in range(count)]
    return [
        maker.film(112, 84, 6) if kind == "film" else getattr(maker, kind)(112, 84)  # a scene's kinds are methods
        for maker in makers
    ]


@pytest.mark.parametrize("kind", [*KINDS, "film"])
def test_a_seed_always_draws_the_same(kind: str) -> None:
    first, again = scenes(kind, 5), scenes(kind, 5)
    assert first == again
    for one, other in zip(first, again, strict=True):
        for a, b in zip(one.pictures, other.pictures, strict=True):
            assert draw(a).tobytes() == draw(b).tobytes()


def test_a_picture_shows_as_many_things_as_it_says() -> None:
    """Connected regions, counted by scikit-image, are the shapes of a crowd."""
    crowds = [scene.pictures[0] for scene in scenes("still", 120) if len(scene.pictures[0].things) > 3]
    crowds = [picture for picture in crowds if all(thing.kind != "text" for thing in picture.things)]
    assert len(crowds) > 20
    for picture in crowds:
        black = tuple(replace(thing, tint=(0, 0, 0)) for thing in picture.things)
        large = Picture(448, 448 * picture.height // picture.width, WHITE, black)
        dark = np.asarray(draw(large, smooth=False).convert("L")) < 128
        assert label(dark).max() == len(picture.things)


def test_a_thing_is_where_and_of_the_color_that_it_says() -> None:
    for scene in scenes("still", 60):
        pixels = np.asarray(draw(scene.pictures[0], smooth=False))
        for thing in scene.pictures[0].things:
            if thing.kind in ("circle", "rectangle", "cross"):
                assert tuple(pixels[int(thing.y * 84), int(thing.x * 84)]) == thing.tint


def test_a_film_moves_the_way_it_says() -> None:
    moving = [scene for scene in scenes("film", 80) if scene.mover]
    assert {scene.direction for scene in moving} == {"left", "right", "up", "down"}
    for scene in moving:
        before, after = (_centre(scene.pictures[index], scene.mover) for index in (0, -1))
        dx, dy = after[0] - before[0], after[1] - before[1]
        seen = ("right" if dx > 0 else "left") if abs(dx) > abs(dy) else ("down" if dy > 0 else "up")
        assert seen == scene.direction


def _centre(picture: Picture, mover: Thing | None) -> tuple[float, float]:
    """Where the mover's pixels are: those that a picture without it does not have."""
    assert mover
    others = tuple(t for t in picture.things if (t.kind, t.color, t.size) != (mover.kind, mover.color, mover.size))
    with_it, without = (np.asarray(draw(replace(picture, things=things))) for things in (picture.things, others))
    rows, columns = np.nonzero((with_it != without).any(-1))
    return float(columns.mean()), float(rows.mean())


@pytest.mark.parametrize("kind", [*KINDS, "film"])
def test_the_same_question_never_has_two_answers(kind: str) -> None:
    for scene in scenes(kind, 60):
        answers: dict[str, str] = {}
        for round_ in range(4):
            for question in Asker(Random(round_)).questions(scene, 20):
                assert answers.setdefault(question.text, question.answer) == question.answer


def test_held_out_scenes_share_nothing_with_training() -> None:
    assert not set(HELD_OUT) & set(TRAINING)
    assert not set(held_out_words()) & set(training_words())
    for training, held_out in WORDINGS.values():
        assert not set(training) & set(held_out)
    lines = [t for scene in scenes("text", 80, held_out=True) for t in scene.pictures[0].things]
    assert {line.font for line in lines} <= set(HELD_OUT)
    assert {line.text for line in lines if line.text.isalpha()} <= set(held_out_words())
