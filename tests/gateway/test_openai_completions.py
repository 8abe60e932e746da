"""/v1/completions."""

from __future__ import annotations

from typing import Any

import openai
from testing.fakes import HOLD

from mdi.core.errors import OverloadedError
from mdi.core.messages import RawText
from tests.gateway.conftest import FakeServer, RealServer


def test_several_prompts_are_numbered_on_and_counted_together(open_server: FakeServer, client: openai.OpenAI) -> None:
    expected = ["a #0", "a #1", "b #0", "b #1"]
    answer = client.completions.create(model="fake", prompt=["a", "b"], n=2)
    assert [choice.text for choice in answer.choices] == expected
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (14, 8)

    texts = ["", "", "", ""]
    for chunk in client.completions.create(model="fake", prompt=["a", "b"], n=2, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == expected


def test_several_prompts_run_all_or_none(server: FakeServer) -> None:
    server.engine.says(HOLD)
    server.engine.refuse = lambda prompt: OverloadedError("full") if prompt == RawText("b") else None
    answer = server.post("/v1/completions", json={"model": "fake", "prompt": ["a", "b"]})
    assert answer.status_code == 429
    assert server.engine.requests[0].cancelled.is_set()


def test_the_openai_client_completes_text(real: RealServer) -> None:
    whole = real.client.completions.create(model="tiny", prompt="Once", max_tokens=6, temperature=0)
    chunks = real.client.completions.create(model="tiny", prompt="Once", max_tokens=6, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text


def test_echo_puts_the_prompt_before_each_answer(open_server: FakeServer, client: openai.OpenAI) -> None:
    answer = client.completions.create(model="fake", prompt=["a", "b"], n=2, echo=True)
    assert [choice.text for choice in answer.choices] == ["aa #0", "aa #1", "bb #0", "bb #1"]
    texts = ["", ""]
    for chunk in client.completions.create(model="fake", prompt=[5, 6], n=2, echo=True, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == ["<5><6>ok #0", "<5><6>ok #1"]


def test_token_ids_are_given_as_in_vllm(open_server: FakeServer, client: openai.OpenAI) -> None:
    asked: Any = {"model": "fake", "prompt": [[5, 6], [7]], "extra_body": {"return_token_ids": True}}
    choices = client.completions.create(**asked).to_dict()["choices"]
    assert [(choice["prompt_token_ids"], choice["token_ids"]) for choice in choices] == [
        ([5, 6], [1, 1]),
        ([7], [1, 1]),
    ]
    chunks = [chunk.to_dict()["choices"][0] for chunk in client.completions.create(**asked, stream=True)]
    assert [chunk["token_ids"] for chunk in chunks] == [[1]] * 4
    assert [chunk.get("prompt_token_ids") for chunk in chunks] == [[5, 6], None, [7], None]


def test_special_tokens_may_be_left_out(server: FakeServer) -> None:
    server.post("/v1/completions", json={"model": "fake", "prompt": "a", "add_special_tokens": False})
    assert server.engine.calls[-1].prompt == RawText("a", add_special_tokens=False)


def test_an_echoed_prompt_has_logprobs_as_lm_eval_reads_them(real: RealServer) -> None:
    ids = list(real.engine.tokenize(RawText("Hällo <|im_start|> you")))
    asked = {"model": "tiny", "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1, "seed": 1}
    for prompt in ([ids], "Hällo <|im_start|> you"):
        choice = real.post("/v1/completions", json=asked | {"prompt": prompt}).json()["choices"][0]
        columns = choice["logprobs"]
        assert {len(column) for column in columns.values()} == {len(ids) + 1}
        assert columns["token_logprobs"][0] is columns["top_logprobs"][0] is None
        # as lm-eval's local-completions takes them: greedy where the token is the likeliest
        for name, logprob, top in zip(
            *(columns[key][1:] for key in ("tokens", "token_logprobs", "top_logprobs")), strict=True
        ):
            assert top[name] == logprob <= max(top.values())
        offsets = columns["text_offset"]
        assert offsets == sorted(offsets)
        assert offsets[columns["tokens"].index("<|im_start|>")] == choice["text"].index("<|im_start|>")
    chunks = real.events("/v1/completions", **asked, prompt=[ids], n=2)[:-1]
    counts = [len(chunk["choices"][0]["logprobs"]["tokens"]) for chunk in chunks]
    assert sum(counts) == 2 * (len(ids) + 1)


def test_echo_and_sampling_give_the_logprobs_of_two_requests(real: RealServer) -> None:
    asked = {"model": "tiny", "prompt": [[5, 6, 7]], "max_tokens": 4, "temperature": 0, "logprobs": 0}
    plain = real.post("/v1/completions", json=asked).json()["choices"][0]["logprobs"]["token_logprobs"]
    echoed = real.post("/v1/completions", json=asked | {"echo": True}).json()["choices"][0]["logprobs"][
        "token_logprobs"
    ]
    assert echoed[3:] == plain
