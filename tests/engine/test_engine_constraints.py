"""Constraints through a whole engine, beside every other setting that decides what is drawn and when an answer ends."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from llguidance import LLParserLimits

from mdi import Engine, SamplingParams
from mdi.core.constraint import Constraint, json_rule
from mdi.core.errors import InputError
from mdi.core.outputs import Completion
from mdi.engine import grammar

QUESTION = "Say it again, say it again. " * 12  # some 350 tokens
FOUR = Constraint("start: /[ab]{4}/", "guided_regex")


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: Path) -> Iterator[Engine]:
    with Engine(tiny_checkpoint, dtype="float32", sequence_length=512, max_sequences=4) as engine:
        yield engine


def asked(engine: Engine, constraint: Constraint, **params: Any) -> Completion:
    settings = {"temperature": 1, "seed": 3, "max_tokens": 20, **params}
    return engine.submit(QUESTION, SamplingParams(**settings), constraint=constraint).completion()


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"ignore_eos": True},
        {"min_tokens": 20},
        {"temperature": 0},
        {"max_tokens": 4},
        {"logit_bias": {ord("z"): 100.0}},
        {"logit_bias": {ord("a"): -100.0, ord("b"): -100.0}},
        {"repetition_penalty": 5.0, "frequency_penalty": 2.0},
        {"top_k": 1, "top_p": 0.1},
        {"stop_token_ids": [ord("b")], "min_tokens": 20},
        {"stop": "b", "min_tokens": 20},
    ],
)
def test_an_answer_ends_where_its_grammar_does(engine: Engine, params: dict[str, Any]) -> None:
    out = asked(engine, FOUR, **params)
    assert re.fullmatch("[ab]{4}", out.text)
    assert out.finish_reason == "stop"
    assert len(out.token_ids) == 4


def test_a_bias_chooses_among_what_the_grammar_allows(engine: Engine) -> None:
    assert asked(engine, FOUR, logit_bias={ord("b"): 100.0}).text == "bbbb"


def test_an_answer_that_is_cut_says_so(engine: Engine) -> None:
    out = asked(engine, Constraint("start: /a+/", "guided_regex"), ignore_eos=True)
    assert (out.text, out.finish_reason) == ("a" * 20, "length")


@pytest.mark.parametrize("stop", [{"stop": "b"}, {"stop_token_ids": [ord("b")]}])
def test_stops_of_the_request_still_end_the_answer(engine: Engine, stop: dict[str, Any]) -> None:
    out = asked(engine, Constraint("start: /[ab]{15}/", "guided_regex"), **stop)
    assert re.fullmatch("a*b?", out.text)
    assert out.finish_reason == "stop"
    assert len(out.token_ids) < 15


def test_every_sample_follows_its_own_text(engine: Engine) -> None:
    """The second request takes over the prompt, and draws the same."""
    three = {"type": "array", "items": {"type": "boolean"}, "minItems": 3, "maxItems": 3}
    constraint = Constraint(f"start: {json_rule(three)}", "guided_json")
    first, second = (asked(engine, constraint, n=4, max_tokens=60) for _ in range(2))
    assert all(re.fullmatch(r"\[ ?((true|false) ?(, ?)?){3}\]", sample.text) for sample in first.samples)
    assert len({sample.text for sample in first.samples}) > 1
    assert first.samples == second.samples
    assert second.usage.cached_tokens > 300


def test_a_grammar_that_cannot_be_followed_fails_its_own_request_alone(engine: Engine) -> None:
    good = engine.submit(QUESTION, SamplingParams(max_tokens=20), constraint=FOUR)
    with pytest.raises(InputError, match=r"^guided_regex: .*look-around") as raised:
        asked(engine, Constraint("start: /(?=a)b/", "guided_regex"))
    assert raised.value.field == "guided_regex"
    assert re.fullmatch("[ab]{4}", good.completion().text)


def test_a_grammar_that_becomes_too_complex_ends_its_own_request_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its states are shared with later requests, which get new ones."""
    running = engine.submit(QUESTION, SamplingParams(max_tokens=20), constraint=Constraint("start: /[cd]{19}/", "f"))
    long = Constraint("start: /[ab]{90}/", "guided_regex")
    with monkeypatch.context() as patch:
        patch.setattr(grammar, "LIMITS", LLParserLimits(verbose_errors=False, max_lexer_states=50))
        with pytest.raises(InputError, match=r"^guided_regex: .*too many states"):
            asked(engine, long, max_tokens=100)
    assert re.fullmatch("[ab]{90}", asked(engine, long, max_tokens=100).text)
    assert re.fullmatch("[cd]{19}", running.completion().text)
