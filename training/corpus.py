"""What the tokenizer learns from: questions and answers, but nothing that signs say."""

from __future__ import annotations

from collections.abc import Iterator

from easy_vqa import get_train_questions

from training.json_answers import in_json, whole_in_json
from training.layout import SYSTEM_PROMPTS
from training.questions import Asker
from training.scenes import SceneMaker
from training.tool_calls import Workshop, listed
from training.unknown import BLIND, GREETING, UNKNOWN

SIDE = 112


def corpus(n_scenes: int = 4000) -> Iterator[str]:
    for index in range(n_scenes):
        maker = SceneMaker(f"corpus {index}")
        film = index % 5 == 4
        makers = (maker.still, maker.still, maker.text, maker.pair)
        scene = maker.film(SIDE, SIDE, 4) if film else makers[index % 5](SIDE, SIDE)
        for question in Asker(maker.random).questions(scene, 8):
            yield question.text
            yield " ".join(word for word in question.answer.split() if not _is_sign(word))
    yield from (UNKNOWN, BLIND, GREETING) * 50
    yield from get_train_questions()[0][:4000]
    for prompt in SYSTEM_PROMPTS:
        yield from ("system", "user", "assistant", prompt) * 200


def json_corpus(n_scenes: int = 600) -> Iterator[str]:
    """What is said in JSON, to tools and by them; signs are in it, for they are spelled all the same."""
    for index in range(n_scenes):
        maker = SceneMaker(f"json corpus {index}")
        random, scene = maker.random, maker.still(SIDE, SIDE)
        for question in Asker(random).questions(scene, 6):
            if question.skill != "strange":
                whole = question.skill == "describe"
                asked = whole_in_json(question, scene.pictures[0], random) if whole else in_json(question, random)
                yield asked.text
                yield asked.answer
        workshop = Workshop(random)
        tools = workshop.tools()
        yield listed("", tools)
        for question in workshop.conversation(scene, tools) or ():
            yield question.text
            yield question.answer


def _is_sign(word: str) -> bool:
    bare = word.rstrip(".")
    return bare != "A" and (bare.isupper() or bare.isdigit())
