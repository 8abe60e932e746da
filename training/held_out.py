"""Questions that training never saw: scenes of other seeds, wordings, words and typefaces, as a client would send them.

Knows nothing of who answers.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import av
import numpy as np
from PIL import Image

from training.questions import SKILLS, Asker, Question
from training.scenes import Picture, Scene, SceneMaker, draw

EASY_VQA = "easy-vqa"
_SCENES = {"read": "text", "compare": "pair", "motion": "film", "change": "film"}
FRAMES_PER_SECOND, SHOWN = (
    6,
    3,
)  # every drawn frame is shown three times: two drawn frames a second, as they are sampled


@dataclass(frozen=True)
class Exam:
    """One question with its media, encoded: PNG stills, or one MP4."""

    question: Question
    images: tuple[bytes, ...] = ()
    video: bytes | None = None

    def messages(self) -> list[dict[str, Any]]:
        """As a user's message."""
        parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in self.images]
        if self.video is not None:
            parts.append({"type": "video", "video": self.video})
        return [{"role": "user", "content": [*parts, {"type": "text", "text": self.question.text}]}]


def exams(skill: str, count: int) -> Iterator[Exam]:
    """The first `count` held-out questions of a skill: one a scene, always the same."""
    if skill == EASY_VQA:
        yield from easy_vqa_exams(count)
        return
    found = index = 0
    while found < count:
        maker = SceneMaker(f"exam {skill} {index}", held_out=True)
        index += 1
        scene = _scene(maker, _SCENES.get(skill, "still"))
        of_skill = [question for question in Asker(maker.random, True).questions(scene, 12) if question.skill == skill]
        if of_skill:
            found += 1
            yield _exam(scene, of_skill[0])


def easy_vqa_exams(count: int | None = None) -> Iterator[Exam]:
    """The test split of easy-vqa in its own order, shuffled once so that a part of it is a fair sample."""
    from easy_vqa import get_test_image_paths, get_test_questions

    texts, answers, pictures = get_test_questions()
    paths = get_test_image_paths()
    order = list(range(len(texts)))
    Random("easy-vqa").shuffle(order)
    for index in order[:count]:
        image = Path(paths[pictures[index]]).read_bytes()
        yield Exam(Question(EASY_VQA, texts[index], answers[index]), (image,))


def all_skills() -> tuple[str, ...]:
    return (*SKILLS, EASY_VQA)


def _scene(maker: SceneMaker, kind: str) -> Scene:
    width, height = _canvas(maker.random, small=kind in ("film", "pair"))
    if kind == "film":
        return maker.film(width, height, maker.random.choice((4, 6, 8)))
    return {"still": maker.still, "text": maker.text, "pair": maker.pair}[kind](width, height)


def _canvas(random: Random, small: bool) -> tuple[int, int]:
    """Any size from 56 to 448 pixels, more small ones than large, and no side over twice the other."""
    longest = 224 if small else 448
    while True:
        side = 56 * (longest / 56) ** (random.random() ** 1.5)
        ratio = 2 ** random.uniform(-0.6, 0.6)
        width, height = round(side * ratio**0.5), round(side / ratio**0.5)
        if min(width, height) >= 56 and max(width, height) <= longest:
            return width - width % 2, height - height % 2


def _exam(scene: Scene, question: Question) -> Exam:
    if scene.skill == "film":
        return Exam(question, video=mp4([draw(picture) for picture in scene.pictures]))
    return Exam(question, tuple(png(picture) for picture in scene.pictures))


def png(picture: Picture) -> bytes:
    buffer = io.BytesIO()
    draw(picture).save(buffer, "PNG")
    return buffer.getvalue()


def mp4(frames: list[Image.Image]) -> bytes:
    """Frames as MPEG-4 video, high quality, `SHOWN` times each."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=FRAMES_PER_SECOND)
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 4_000_000
        for frame in frames:
            for _ in range(SHOWN):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(frame), format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()
