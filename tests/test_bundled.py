"""The bundled checkpoint: right answers about held-out scenes, equal to transformers', which depend on positions."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from random import Random

import pytest
import torch
from benchmarks.quality import ask_all
from testing.processes import serving
from training.held_out import JSON, TOOLS, Exam, all_skills, exams
from training.unknown import strange_question
from transformers import AutoTokenizer

from mdi import Engine, SamplingParams
from mdi.bench.peers import Transformers
from mdi.checkpoint.bundled import SHIPPED
from mdi.checkpoint.source import open_source
from mdi.layers.rope import MediaSpan
from mdi.prompt import assembly as engine_prompt

MEGABYTE = 10**6
FLOOR = 0.8  # benchmarks/quality.py measures the quality; this only finds what is broken
MAX_TOKENS = 64
GREEDY = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
PER_SKILL = 20


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(SHIPPED, dtype="float32") as engine:
        yield engine


def accuracy(engine: Engine, asked: Sequence[Exam]) -> float:
    streams = [engine.submit(exam.messages(), GREEDY) for exam in asked]
    texts = [stream.completion().text for stream in streams]
    return sum(text == exam.question.answer for text, exam in zip(texts, asked, strict=True)) / len(asked)


def test_it_is_small_and_opens_with_transformers() -> None:
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 12 * MEGABYTE
    source = open_source(SHIPPED)
    assert source.model_config.architecture == "Qwen2VLForConditionalGeneration"
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    text = "Grüße, 世界! \N{WAVING HAND SIGN}\t\x00 end"
    assert tokenizer.decode(tokenizer(text).input_ids, clean_up_tokenization_spaces=False) == text


@pytest.mark.parametrize("skill", all_skills())
def test_it_answers_what_it_has_never_seen(skill: str, engine: Engine) -> None:
    assert accuracy(engine, list(exams(skill, PER_SKILL))) >= FLOOR


@pytest.mark.slow
def test_it_answers_in_json_and_calls_tools() -> None:
    """Held to the schema, and free to call: by keys and tools that training never saw."""
    chosen = {skill: list(exams(skill, 60)) for skill in (JSON, TOOLS)}
    with serving(SHIPPED, "--n-nodes", "2") as (_, url):
        answered = asyncio.run(ask_all(url, chosen))
    for answers in answered.values():
        assert sum(answer.right for answer in answers) >= FLOOR * len(answers)
    assert sum(bool(answer.calls) and answer.right for answer in answered[TOOLS]) > 10


def test_transformers_gives_the_same_answers(engine: Engine) -> None:
    oracle = Transformers(open_source(SHIPPED))
    for skill in all_skills():
        for exam in exams(skill, 2):
            ours = engine.chat(exam.messages(), GREEDY).text
            assert ours == oracle.text(exam.messages(), MAX_TOKENS)


@pytest.mark.parametrize("skill", ["position", "motion"])
def test_its_answers_depend_on_all_axes_of_the_positions(
    skill: str, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list(exams(skill, 40))
    before = accuracy(engine, asked)

    def in_one_row(length: int, spans: Sequence[MediaSpan]) -> tuple[torch.Tensor, int]:
        return torch.arange(length).expand(3, length), 0

    monkeypatch.setattr(engine_prompt, "prompt_positions", in_one_row)
    assert accuracy(engine, asked) < before - 0.1


def test_answers_end_by_themselves_whatever_is_asked(engine: Engine) -> None:
    random = Random("strange")
    image = next(exams("shape", 1)).images[0]
    questions = [strange_question(random) for _ in range(50)]
    reasons = [
        engine.chat(
            [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}], GREEDY
        ).finish_reason
        for text in questions
        if text.strip()
    ]
    assert reasons.count("stop") >= 0.95 * len(reasons)
