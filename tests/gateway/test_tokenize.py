"""/tokenize and /detokenize."""

from __future__ import annotations

from typing import Any

import pytest
from testing.fakes import HOLD

from mdi.core.errors import OverloadedError
from mdi.core.messages import RawText
from tests.gateway.conftest import HELLO, FakeServer, RealServer, image_chat


def test_a_prompt_becomes_the_ids_of_its_completion(real: RealServer) -> None:
    counted = real.post("/tokenize", json={"model": "tiny", "prompt": "Hello", "return_token_strs": True}).json()
    asked = {"model": "tiny", "prompt": "Hello", "max_tokens": 1, "return_token_ids": True}
    answer = real.post("/v1/completions", json=asked).json()
    assert counted["tokens"] == answer["choices"][0]["prompt_token_ids"]
    assert counted["count"] == len(counted["tokens"])
    assert "".join(counted["token_strs"]) == "Hello"
    assert counted["max_model_len"] == real.engine.capabilities.max_model_len
    assert real.post("/detokenize", json={"tokens": counted["tokens"]}).json() == {"prompt": "Hello"}


def test_messages_become_the_ids_of_their_chat(real: RealServer, picture: str) -> None:
    for messages in (HELLO, image_chat(picture)):
        chat = {"model": "tiny", "messages": messages, "max_tokens": 1, "max_pixels": 5000}
        counted = real.post("/tokenize", json=chat).json()
        answer = real.post("/v1/chat/completions", json=chat | {"return_token_ids": True}).json()
        assert counted["tokens"] == answer["prompt_token_ids"]
        assert counted["count"] == answer["usage"]["prompt_tokens"]
    fewer = real.post("/tokenize", json={"messages": HELLO, "add_generation_prompt": False}).json()["tokens"]
    more = real.post("/tokenize", json={"messages": HELLO}).json()["tokens"]
    assert more[: len(fewer)] == fewer
    assert len(fewer) < len(more)


def test_special_tokens_of_a_prompt_may_be_left_out(server: FakeServer) -> None:
    server.post("/tokenize", json={"prompt": "a", "add_special_tokens": False})
    assert server.engine.calls[-1].prompt == RawText("a", add_special_tokens=False)


def test_what_belongs_to_messages_alone_is_ignored_by_name(server: FakeServer) -> None:
    answer = server.post("/tokenize", json={"prompt": "a", "tools": [], "max_pixels": 5000})
    assert answer.headers["x-mdi-ignored"] == "max_pixels, tools"


@pytest.mark.parametrize(
    ("path", "asked", "field"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": HELLO}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"messages": [{"role": "x", "content": "y"}]}, "messages[0].role"),
        ("/tokenize", {"messages": HELLO, "add_special_tokens": True}, "add_special_tokens"),
        ("/tokenize", {"prompt": "a", "model": "x"}, "model"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens[0]"),
        ("/detokenize", {"tokens": [True]}, "tokens[0]"),
    ],
)
def test_malformed_requests_are_named(server: FakeServer, path: str, asked: Any, field: str) -> None:
    answer = server.post(path, json=asked)
    assert answer.status_code == (404 if field == "model" else 400)
    assert answer.json()["error"]["param"] == field


def test_a_full_queue_is_said(server: FakeServer) -> None:
    server.engine.refuse = lambda _: OverloadedError("full")
    assert server.post("/tokenize", json={"prompt": "a"}).status_code == 429


def test_embeddings_are_refused_with_the_reason(server: FakeServer) -> None:
    answer = server.post("/v1/embeddings", json={"model": "fake", "input": "a"})
    assert answer.status_code == 400
    assert "gives no embeddings" in answer.json()["error"]["message"]


def test_models_say_what_they_can_do(server: FakeServer) -> None:
    model = server.get("/v1/models/gpt-4o").json()
    assert model["root"] == "fake"
    assert model["max_model_len"] == server.engine.capabilities.max_model_len
    assert model["modalities"] == list(server.engine.capabilities.modalities)
    assert "tools" in model["capabilities"]


def test_load_and_version(server: FakeServer) -> None:
    assert server.get("/load").json() == {"server_load": 0, "running": 0, "waiting": 0}
    server.engine.says(HOLD)
    server.engine.submit("x")
    assert server.get("/load").json() == {"server_load": 1, "running": 1, "waiting": 0}
    assert server.get("/version").json()["version"]
    assert server.get("/ping").json()["status"] == server.post("/ping").json()["status"] == "ok"
