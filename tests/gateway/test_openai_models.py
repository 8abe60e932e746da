"""/v1/models."""

from __future__ import annotations

import openai
import pytest

from tests.gateway.conftest import CHAT, HELLO, FakeServer, RealServer


def test_the_model_answers_to_its_given_names(server: FakeServer) -> None:
    listed = server.get("/v1/models").json()["data"]
    assert [model["id"] for model in listed] == ["fake", "gpt-4o", "org/name"]
    assert server.get("/v1/models/org/name").json()["id"] == "org/name"
    assert server.post("/v1/chat/completions", json={**CHAT, "model": "gpt-4o"}).json()["model"] == "fake"


def test_an_unknown_model_is_not_found_as_the_openai_client_expects(
    open_server: FakeServer, client: openai.OpenAI
) -> None:
    with pytest.raises(openai.NotFoundError, match="'gpt-9' is not served here: ask for 'fake'") as caught:
        client.chat.completions.create(model="gpt-9", messages=HELLO)
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-9")


def test_the_openai_client_lists_models(real: RealServer) -> None:
    assert [model.id for model in real.client.models.list()] == ["tiny"]
    assert real.client.models.retrieve("tiny").id == "tiny"
