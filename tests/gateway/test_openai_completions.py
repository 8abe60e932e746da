"""/v1/completions."""

from __future__ import annotations

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
