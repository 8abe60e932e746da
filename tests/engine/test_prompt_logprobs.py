"""Logprobs of a prompt's own tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from testing.checkpoints import tiny_config

from mdi import Engine, SamplingParams, TokenIds
from mdi.checkpoint.random_weights import write_random_checkpoint
from mdi.engine import Stream

IDS = tuple(7 * index % 250 for index in range(700))  # more than one batch takes


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("tiny"), tiny_config(num_hidden_layers=2))


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Iterator[Engine]:
    with Engine(checkpoint, sequence_length=1024, max_sequences=3, dtype="float32") as engine:
        yield engine


def ask(engine: Engine, ids: tuple[int, ...], prompt_logprobs: int | None = None) -> Stream:
    params = SamplingParams(max_tokens=3, temperature=0, prompt_logprobs=prompt_logprobs)
    stream = engine.submit(TokenIds(ids), params)
    stream.completion()
    return stream


def test_they_are_those_of_transformers(engine: Engine, checkpoint: Path) -> None:
    from transformers import Qwen2VLForConditionalGeneration

    stream = ask(engine, IDS, prompt_logprobs=2)
    model = Qwen2VLForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.tensor([IDS])).logits[0].log_softmax(-1)
    assert [token.id for token in stream.prompt_logprobs] == list(IDS[1:])
    found = torch.tensor([token.logprob for token in stream.prompt_logprobs])
    wanted = expected[:-1].gather(1, torch.tensor(IDS[1:])[:, None])[:, 0]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    likeliest = [token.top_logprobs[0][0] for token in stream.prompt_logprobs]
    assert likeliest == expected[:-1].argmax(-1).tolist()


def test_the_answer_is_the_same_and_no_prefix_is_taken_over(engine: Engine) -> None:
    plain = engine.chat(TokenIds(IDS), SamplingParams(max_tokens=3, temperature=0))
    params = SamplingParams(max_tokens=3, temperature=0, prompt_logprobs=0, n=2)
    again = engine.submit(TokenIds(IDS), params)
    answer = again.completion()
    assert [sample.token_ids for sample in answer.samples] == [plain.token_ids] * 2
    assert answer.usage.cached_tokens == 0
    assert len(again.prompt_logprobs) == len(IDS) - 1
    assert ask(engine, IDS).usage.cached_tokens == len(IDS) - 1  # what the plain request left


def test_a_prompt_of_one_token_has_none(engine: Engine) -> None:
    assert ask(engine, (5,), prompt_logprobs=1).prompt_logprobs == ()
    assert ask(engine, (5, 6)).prompt_logprobs == ()
