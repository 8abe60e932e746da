"""The OpenAPI document tells the truth about requests, answers and errors."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.generation import GenerationMode
from testing.checkpoints import tiny_config
from testing.fakes import FakeEngine, piece

from mdi import Engine
from mdi.checkpoint.random_weights import write_random_checkpoint
from mdi.core.config import GatewayConfig
from mdi.core.errors import LinkError, OverloadedError
from mdi.gateway.app import create_app
from mdi.gateway.middleware.api_keys import OPEN_PATHS
from mdi.media import MediaPolicy
from tests.gateway.conftest import CHAT, FakeServer, RealServer, serving

Document = dict[str, Any]
ERRORS = {"400", "401", "403", "413", "415", "429", "500", "503", "504"}
QUESTIONS = (
    "/generate",
    "/generate/multimodal",
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/tokenize",
)


@pytest.fixture(scope="module")
def document() -> Document:
    return create_app(FakeEngine(), GatewayConfig(api_keys=("key",))).openapi()


def check(document: Document, path: str, answer: Any, status: int = 200, method: str = "post") -> None:
    """Whether the document describes an answer, or the event of a stream."""
    content = document["paths"][path][method]["responses"][str(status)]["content"]
    if isinstance(answer, str):
        data = content["text/event-stream"]["itemSchema"]["properties"]["data"]
        done, part = data.get("anyOf", (None, data))
        if done and answer == done["const"]:
            return
        schema, answer = part["contentSchema"], json.loads(answer)
    else:
        schema = content["application/json"]["schema"]
    jsonschema_rs.Draft202012Validator({**schema, "components": document["components"]}).validate(answer)


def test_every_route_declares_its_errors_and_none_that_never_comes(document: Document) -> None:
    """C21: 400 to 504 with their bodies, and no 422."""
    for path, operations in document["paths"].items():
        for operation in operations.values():
            statuses = set(operation["responses"])
            assert "422" not in statuses
            assert {"200", "403", "500"} <= statuses
            assert ("401" in statuses) == (path not in OPEN_PATHS) == ("security" in operation)
            if path in QUESTIONS:
                assert statuses >= ERRORS
                assert ("404" in statuses) == (not path.startswith("/generate"))
    assert "HTTPValidationError" not in document["components"]["schemas"]
    assert set(document["components"]["securitySchemes"]) == {"bearer", "x-api-key"}


def test_the_form_of_generate_multimodal_is_described(document: Document) -> None:
    """C21: files, a prompt, and the other fields as the text of their JSON."""
    body = document["paths"]["/generate/multimodal"]["post"]["requestBody"]["content"]
    assert set(body) == {"application/json", "multipart/form-data"}
    form = body["multipart/form-data"]["schema"]["properties"]
    assert {"prompt", "messages", "image", "images", "video", "videos", "file", "files", "max_tokens"} <= set(form)


def test_answers_are_as_the_document_says(tiny: RealServer) -> None:
    """C21: whole answers, events and errors of a real engine."""
    document = tiny.get("/openapi.json").json()
    for path, asked in (
        ("/generate", {"prompt": "x"}),
        ("/generate/multimodal", {"messages": CHAT["messages"]}),
        ("/v1/chat/completions", {**CHAT, "model": "tiny", "logprobs": True, "top_logprobs": 2}),
        ("/v1/completions", {"model": "tiny", "prompt": ["x", [5]], "logprobs": 2}),
    ):
        limits = {"max_tokens": 3}
        check(document, path, tiny.post(path, json=asked | limits).json())
        check(document, path, tiny.post(path, json=asked | {"top_p": 2}).json(), 400)
        usage = {"stream_options": {"include_usage": True}} if path.startswith("/v1") else {}
        events = tiny.events(path, **asked | limits | usage)
        assert len(events) >= 2
        for event in events:
            check(document, path, event if event == "[DONE]" else json.dumps(event))
    for asked in ({"prompt": "x", "return_token_strs": True}, {"messages": CHAT["messages"]}):
        check(document, "/tokenize", tiny.post("/tokenize", json=asked).json())
    check(document, "/tokenize", tiny.post("/tokenize", json={}).json(), 400)
    check(document, "/detokenize", tiny.post("/detokenize", json={"tokens": [5]}).json())
    check(document, "/detokenize", tiny.post("/detokenize", json={"tokens": [99999]}).json(), 400)
    check(document, "/ping", tiny.post("/ping").json())
    kept = tiny.post("/v1/responses", json={"model": "tiny", "input": "x", "max_output_tokens": 3}).json()
    check(document, "/v1/responses", kept)
    check(document, "/v1/responses", tiny.post("/v1/responses", json={"model": "tiny"}).json(), 400)
    named = "/v1/responses/{name}"
    check(document, named, tiny.get(f"/v1/responses/{kept['id']}").json(), method="get")
    check(document, named, tiny.get("/v1/responses/x").json(), 404, "get")
    deleted = httpx.delete(f"{tiny.url}/v1/responses/{kept['id']}", headers=tiny.headers, timeout=60, verify=False)
    check(document, named, deleted.json(), method="delete")
    for event in tiny.named_events("/v1/responses", model="tiny", input="x", max_output_tokens=3):
        check(document, "/v1/responses", json.dumps(event))
    message = {"model": "tiny", "messages": CHAT["messages"], "max_tokens": 3}
    check(document, "/v1/messages", tiny.post("/v1/messages", json=message).json())
    check(document, "/v1/messages", tiny.post("/v1/messages", json=message | {"max_tokens": 0}).json(), 400)
    check(document, "/v1/messages", tiny.post("/v1/messages", json=message | {"model": "x"}).json(), 404)
    for event in tiny.named_events("/v1/messages", **message):
        check(document, "/v1/messages", json.dumps(event))
    check(document, "/v1/messages/count_tokens", tiny.post("/v1/messages/count_tokens", json=message).json())
    for path in ("/v1/models", "/v1/nodes", "/health", "/health/ready", "/ping", "/version", "/load"):
        check(document, path, tiny.get(path).json(), method="get")
    check(document, "/v1/models/{name}", tiny.get("/v1/models/tiny").json(), method="get")
    check(document, "/v1/models/{name}", tiny.get("/v1/models/x").json(), 404, "get")


def _the_same(error: Exception, _prompt: Any) -> Exception:
    return error


def test_errors_in_place_of_answers_are_as_the_document_says(lenient: FakeServer) -> None:
    """C21: a full queue, a lost node, an unknown model, a wrong type of body, an engine that gave up."""
    document, engine = lenient.get("/openapi.json").json(), lenient.engine
    for refusal, status in ((OverloadedError("full"), 429), (LinkError("lost"), 503), (RuntimeError("x"), 500)):
        engine.refuse = partial(_the_same, refusal)
        for path, asked in (("/generate", {"prompt": "x"}), ("/v1/chat/completions", CHAT)):
            answer = lenient.post(path, json=asked)
            assert answer.status_code == status
            check(document, path, answer.json(), status)
            check(document, path, lenient.post(path, content="x").json(), 415)
    engine.reset()
    check(
        document, "/v1/chat/completions", lenient.post("/v1/chat/completions", json=CHAT | {"model": "x"}).json(), 404
    )
    engine.says(piece("a"), LinkError("lost"))
    for event in lenient.events("/v1/chat/completions", **CHAT):
        check(document, "/v1/chat/completions", json.dumps(event))
    engine.reset()
    engine.error = LinkError("gone")
    for path in ("/health", "/health/ready"):
        engine.answer_ready = lambda: False
        check(document, path, lenient.get(path).json(), 503, "get")
    engine.reset()


CROSS_FIELDS = (
    *("min_tokens is", "top_logprobs needs", "send one of them", "of a list every frame is taken"),
    *("which is not among the tools", "asks for a call, but there are no", "rename one"),
    *("send a prompt, or messages", "cannot both continue", "leave add_special_tokens out"),
    *("response_format.structures is missing", "response_format.triggers is missing", "with one of the triggers"),
    *("response_format.json_schema is missing", "is not kept here", "the last message calls tools"),
    "is in the request twice",
    "must be a list with at least one message",  # items that are no messages alone
)
"""What a request is refused for and its schema cannot say."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [
        "/generate",
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/messages",
        "/tokenize",
        "/detokenize",
    ],
)
def test_what_the_document_allows_is_accepted(path: str) -> None:
    """C21: random bodies of the document's schemas, read by the real gateway."""
    engine = FakeEngine()
    app = create_app(engine, GatewayConfig(allow_hosts=("testserver",)))
    operation = schemathesis.openapi.from_asgi("/openapi.json", app)[path]["POST"]

    @settings(
        max_examples=25,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=GenerationMode.POSITIVE))
    def accepted(case: Any) -> None:
        engine.reset()
        answer = case.call()
        if not any(cause in answer.text for cause in CROSS_FIELDS):
            assert answer.status_code == 200, answer.text

    accepted()


SETTINGS = """
[checks]
# the document knows neither the vocabulary nor the sequence length, and no text is a picture
positive_data_acceptance.expected-statuses = ["2xx", "400", "404", "429"]
"""


@pytest.fixture
def brief(tmp_path: Path) -> Iterator[RealServer]:
    """Serves a tiny model that ends every answer after a token, unless it is asked not to."""
    path = write_random_checkpoint(tmp_path / "tiny", tiny_config(num_hidden_layers=1))
    generation = json.loads((path / "generation_config.json").read_text())
    (path / "generation_config.json").write_text(json.dumps(generation | {"eos_token_id": list(range(272))}))
    media = MediaPolicy(remote=False)
    with Engine(path, sequence_length=128, max_sequences=16, media=media) as engine, serving(engine) as server:
        yield server


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_schemathesis_finds_nothing(brief: RealServer, tmp_path: Path) -> None:
    """C21: all checks and phases over the document, against a real engine.

    Its warnings are off: only the server makes names of responses, and /tokenize takes one of two fields.
    """
    (tmp_path / "schemathesis.toml").write_text(SETTINGS)
    limits = ["--max-examples", "6", "--seed", "1", "--no-color", "--warnings", "off"]
    done = subprocess.run(
        [Path(sys.executable).with_name("schemathesis"), "run", f"{brief.url}/openapi.json", *limits],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    assert "No issues found" in done.stdout
    assert brief.get("/health/ready").status_code == 200
