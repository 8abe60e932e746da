"""Questions that training never saw: scenes of other seeds, wordings, words and typefaces, as a client would send them.

Knows nothing of who answers.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count as count_from
from pathlib import Path
from random import Random
from typing import Any

import av
import numpy as np
from PIL import Image

from training.json_answers import in_json, schema_of, whole_in_json
from training.questions import SKILLS, Asker, Question
from training.scenes import Picture, Scene, SceneMaker, draw
from training.tool_calls import Workshop, read_call, read_result

EASY_VQA, JSON, TOOLS = "easy-vqa", "json", "tools"
_SCENES = {"read": "text", "compare": "pair", "motion": "film", "change": "film"}
FRAMES_PER_SECOND, SHOWN = (
    6,
    3,
)  # every drawn frame is shown three times: two drawn frames a second, as they are sampled


@dataclass(frozen=True)
class Exam:
    """One question with its media, encoded: PNG stills, or one MP4.

    schema: what the answer is to be, as a JSON schema. tools: what the model may call, in OpenAI's form. request: what
    the user said before the question, where the question is the result of a tool; call: the call between them.
    """

    question: Question
    images: tuple[bytes, ...] = ()
    video: bytes | None = None
    schema: dict[str, Any] | None = None
    tools: tuple[dict[str, Any], ...] = ()
    request: str = ""
    call: dict[str, Any] | None = None

    def right(self, text: str, calls: Sequence[dict[str, Any]] = ()) -> bool:
        """Whether this is the true answer, to the letter; of JSON and calls, whether the values are the true ones."""
        answer = self.question.answer
        if self.schema is not None:
            return not calls and _parsed(text) == json.loads(answer)
        call = read_call(answer)
        return calls == [call] if call else not calls and text == answer

    def messages(self) -> list[dict[str, Any]]:
        """As a user's message; with a call, also the call and its result."""
        parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in self.images]
        if self.video is not None:
            parts.append({"type": "video", "video": self.video})
        text = self.request or self.question.text
        asked = {"role": "user", "content": [*parts, {"type": "text", "text": text}]}
        if self.call is None:
            return [asked]
        function = self.call | {"arguments": json.dumps(self.call["arguments"])}
        called = {"role": "assistant", "tool_calls": [{"id": "call-1", "type": "function", "function": function}]}
        result = read_result(self.question.text)
        return [asked, called, {"role": "tool", "tool_call_id": "call-1", "content": result}]


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def exams(skill: str, count: int) -> Iterator[Exam]:
    """The first `count` held-out questions of a skill: one a scene, always the same."""
    if skill in OTHER_EXAMS:
        yield from OTHER_EXAMS[skill](count)
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


def json_exams(count: int) -> Iterator[Exam]:
    """Questions of all skills in turn, each answered by a schema with keys that training never uses."""
    for index in range(count):
        skill = SKILLS[index % len(SKILLS)]
        random = Random(f"exam json {index}")
        scene, question = _question(skill, f"exam json {skill} {index}")
        if skill == "describe":
            question = whole_in_json(question, scene.pictures[0], random)
        else:
            question = in_json(question, random, held_out=True)
        yield replace(_exam(scene, question), schema=schema_of(json.loads(question.answer)))


def tool_exams(count: int) -> Iterator[Exam]:
    """Requests that a tool fits, their results, requests that none fits, and plain questions, as they come."""
    index = found = 0
    while found < count:
        maker = SceneMaker(f"exam tools {index}", held_out=True)
        index += 1
        scene = _scene(maker, "still")
        workshop = Workshop(maker.random, held_out=True)
        tools = workshop.tools()
        plain = [[question] for question in Asker(maker.random, True).questions(scene, 1)]
        conversation = workshop.conversation(scene, tools) if maker.random.random() < 0.8 else next(iter(plain), None)
        if not tools or not conversation:
            continue
        found += 1
        exam = replace(_exam(scene, conversation[0]), tools=tuple(tool.schema() for tool in tools))
        if len(conversation) == 2 and maker.random.random() < 0.4:
            call = read_call(conversation[0].answer)
            exam = replace(exam, question=conversation[1], request=conversation[0].text, call=call)
        yield exam


OTHER_EXAMS = {EASY_VQA: easy_vqa_exams, JSON: json_exams, TOOLS: tool_exams}


def all_skills() -> tuple[str, ...]:
    return (*SKILLS, EASY_VQA)


def _question(skill: str, seed: str) -> tuple[Scene, Question]:
    """The first question of a skill about scenes of this seed."""
    for index in count_from(0):
        maker = SceneMaker(f"{seed} {index}", held_out=True)
        scene = _scene(maker, _SCENES.get(skill, "still"))
        for question in Asker(maker.random, True).questions(scene, 12):
            if question.skill == skill:
                return scene, question
    raise AssertionError


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
