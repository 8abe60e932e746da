"""Sampling settings through a whole engine: what transformers' `generate` does with the same ones."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from mdi import Engine, SamplingParams
from mdi.core.constraint import Constraint
from mdi.core.errors import InputError
from mdi.prompt.builder import PixelRange

QUESTION = "Say it again, say it again, say it again."


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: Path) -> Iterator[Engine]:
    with Engine(tiny_checkpoint, n_nodes=2, dtype="float32", sequence_length=512) as engine:
        yield engine


def greedy(**settings: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": 40, **settings})


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_a_repetition_penalty_gives_the_tokens_of_transformers(
    engine: Engine, tiny_checkpoint: Path, penalty: float
) -> None:
    ours = engine.chat(QUESTION, greedy(repetition_penalty=penalty, ignore_eos=True)).token_ids
    prompt = torch.tensor([engine._prompts.build(QUESTION, PixelRange(None, None)).token_ids])
    theirs = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint, dtype=torch.float32).generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=40,
        repetition_penalty=penalty,
        eos_token_id=[],
    )
    assert ours == tuple(theirs[0, prompt.shape[1] :].tolist())
    assert ours != engine.chat(QUESTION, greedy(ignore_eos=True)).token_ids


def test_frequency_and_presence_penalties_make_answers_vary(engine: Engine) -> None:
    plain, varied = (
        engine.chat(QUESTION, greedy(ignore_eos=True, **settings)).token_ids
        for settings in ({}, {"frequency_penalty": 2.0, "presence_penalty": 2.0})
    )
    assert len(set(varied)) > len(set(plain))


def test_a_bias_decides_what_is_said(engine: Engine) -> None:
    assert set(engine.chat(QUESTION, greedy(logit_bias={7: 100.0}, max_tokens=5)).token_ids) == {7}
    first = engine.chat(QUESTION, greedy(max_tokens=1)).token_ids[0]
    assert engine.chat(QUESTION, greedy(logit_bias={first: -100.0}, max_tokens=1)).token_ids[0] != first


def test_a_token_may_end_the_answer(engine: Engine) -> None:
    whole = engine.chat(QUESTION, greedy(ignore_eos=True)).token_ids
    out = engine.chat(QUESTION, greedy(ignore_eos=True, stop_token_ids=[whole[4]]))
    assert out.token_ids == whole[: whole.index(whole[4]) + 1]
    assert out.finish_reason == "stop"


def test_no_token_ends_the_answer_too_early(engine: Engine) -> None:
    whole = engine.chat(QUESTION, greedy(ignore_eos=True)).token_ids
    stop = {"ignore_eos": True, "stop_token_ids": [whole[1]]}
    early, late = (engine.chat(QUESTION, greedy(min_tokens=least, **stop)).token_ids for least in (0, 6))
    assert len(early) <= 2
    assert len(late) >= 7
    assert whole[1] not in late[:6]


def test_the_likeliest_tokens_are_reported(engine: Engine) -> None:
    out = engine.chat(QUESTION, greedy(top_logprobs=4, max_tokens=6))
    tokens = out.samples[0].tokens
    assert [len(token.top_logprobs) for token in tokens] == [4] * len(out.token_ids)
    for token in tokens:
        assert token.top_logprobs[0] == (token.id, token.logprob)
        values = [value for _, value in token.top_logprobs]
        assert values == sorted(values, reverse=True)


def test_a_penalised_answer_survives_the_loss_of_a_node(engine: Engine) -> None:
    params = SamplingParams(temperature=1, seed=3, max_tokens=60, repetition_penalty=1.2, ignore_eos=True)
    undisturbed = engine.chat(QUESTION, params).token_ids
    stream = engine.submit(QUESTION, params)
    pieces = [next(stream) for _ in range(5)]
    os.kill(engine.nodes()[1].pid, signal.SIGKILL)
    pieces += stream
    assert tuple(token.id for piece in pieces for token in piece.tokens) == undisturbed


def test_a_constraint_holds_on_all_nodes_and_after_a_loss(engine: Engine) -> None:
    pairs = Constraint("start: /([abc][xy])*/", "pairs")
    params = SamplingParams(temperature=1, seed=5, max_tokens=60, ignore_eos=True)
    undisturbed = engine.submit(QUESTION, params, constraint=pairs).completion()
    assert re.fullmatch("([abc][xy]){30}", undisturbed.text)
    assert len(set(undisturbed.text)) == 5
    stream = engine.submit(QUESTION, params, constraint=pairs)
    pieces = [next(stream) for _ in range(5)]
    os.kill(engine.nodes()[1].pid, signal.SIGKILL)
    pieces += stream
    assert "".join(piece.text for piece in pieces) == undisturbed.text
    assert engine.recovery.recoveries > 0


@pytest.mark.parametrize(("field", "ids"), [("logit_bias", {10**6: 1.0}), ("stop_token_ids", [10**6])])
def test_tokens_the_model_does_not_have_are_refused(engine: Engine, field: str, ids: Any) -> None:
    with pytest.raises(InputError, match=f"{field}: the model has .* tokens, and no token 1000000"):
        engine.submit("Hi", SamplingParams(**{field: ids}))
