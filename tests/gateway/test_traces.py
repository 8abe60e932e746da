"""Traces of requests, as a collector gets them: OTLP over HTTP."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from testing.fakes import HOLD, FakeEngine, piece
from testing.waiting import wait_for

from mdi import Engine
from mdi.core.config import GatewayConfig
from mdi.core.errors import ConfigError, LinkError
from mdi.core.histogram import Distribution
from mdi.core.outputs import Timing, Usage
from mdi.core.status import Measurements
from mdi.gateway.server import check_files
from mdi.gateway.traces import Phase, TracedRequest, phases
from tests.gateway.conftest import CHAT, Server, image_chat, serving

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
RECOVERY = ("recovery", 4.0, 6.0)
NOTHING = Distribution((), (0,), 0.0)


@dataclass
class Collector:
    """What came to it. paths: of the requests."""

    url: str
    spans: list[Span] = field(default_factory=list)
    resource: dict[str, str] = field(default_factory=dict)
    paths: set[str] = field(default_factory=set)

    def take(self, path: str, body: bytes) -> None:
        self.paths.add(path)
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.resource |= {each.key: each.value.string_value for each in resource.resource.attributes}
            for scope in resource.scope_spans:
                self.spans += scope.spans


@pytest.fixture
def collector() -> Iterator[Collector]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            found.take(self.path, self.rfile.read(int(self.headers["Content-Length"])))
            answer = ExportTraceServiceResponse().SerializeToString()
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    found = Collector(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield found
    server.shutdown()
    thread.join()
    server.server_close()


def wait_for_traces(server: Server[Any], collector: Collector, n: int = 1) -> None:
    """An answer may be there before its trace has begun its way."""
    app: Any = server.http.config.app

    def come() -> bool:
        app.state.traces.flush()
        return len([span for span in collector.spans if span.name == "gateway"]) >= n

    wait_for(come, 10)


def attributes(span: Span) -> dict[str, str | int]:
    return {each.key: each.value.string_value or each.value.int_value for each in span.attributes}


def test_a_request_is_a_trace_of_its_steps(collector: Collector, tiny_checkpoint: Path, picture: str) -> None:
    """Each inside the one of the gateway, one after the other; an image is encoded."""
    began_ns = time.time_ns()
    with Engine(tiny_checkpoint, sequence_length=512) as engine:  # noqa: SIM117
        with serving(engine, GatewayConfig(otlp_traces_endpoint=collector.url)) as server:
            body = {"model": engine.model_name, "messages": image_chat(picture), "max_tokens": 3}
            assert server.post("/v1/chat/completions", json=body).status_code == 200
            assert server.get("/v1/nodes").status_code == 200
            wait_for_traces(server, collector)
    root, steps = collector.spans[-1], collector.spans[:-1]
    assert [span.name for span in collector.spans] == ["prompt", "encode", "queue", "prefill", "decode", "gateway"]
    assert {span.trace_id for span in collector.spans} == {root.trace_id}
    assert {span.parent_span_id for span in steps} == {root.span_id}
    times = [root.start_time_unix_nano, *(span.start_time_unix_nano for span in steps)]
    ends = [*(span.end_time_unix_nano for span in steps), root.end_time_unix_nano]
    assert times == sorted(times)
    assert times[2:] == ends[:4]
    assert began_ns - 1e6 <= times[0] <= ends[-2] <= ends[-1] <= time.time_ns() + 1e6
    found = attributes(root)
    assert (found["http.route"], found["http.response.status_code"]) == ("/v1/chat/completions", 200)
    assert (found["gen_ai.request.model"], found["gen_ai.usage.output_tokens"]) == (engine.model_name, 3)
    assert collector.paths == {"/v1/traces"}
    assert collector.resource["service.name"] == "mdi"


@pytest.mark.parametrize("stream", [False, True])
def test_it_belongs_to_the_trace_of_its_client(collector: Collector, stream: bool) -> None:
    with serving(FakeEngine(), GatewayConfig(otlp_traces_endpoint=f"{collector.url}/other/")) as server:
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "mine"}
        server.post("/v1/chat/completions", json={**CHAT, "stream": stream}, headers=headers)
        wait_for_traces(server, collector)
    root = collector.spans[-1]
    assert (root.trace_id.hex(), root.parent_span_id.hex()) == (TRACE, PARENT)
    assert attributes(root)["mdi.request_id"] == "mine"
    assert collector.paths == {"/other/"}


def test_errors_and_clients_that_leave_are_traced(collector: Collector) -> None:
    engine = FakeEngine()
    with serving(engine, GatewayConfig(otlp_traces_endpoint=collector.url)) as server:
        assert server.post("/v1/chat/completions", json={"model": "fake"}).status_code == 400
        engine.says(LinkError("lost"))
        assert server.post("/v1/chat/completions", json=CHAT).status_code == 503
        engine.says(piece("a"), LinkError("lost"))
        assert server.post("/v1/chat/completions", json={**CHAT, "stream": True}).status_code == 200
        engine.says(piece("a"), HOLD)
        url = f"{server.url}/v1/chat/completions"
        with httpx.stream("POST", url, json={**CHAT, "stream": True}, headers=server.headers) as answer:
            next(answer.iter_lines())
        wait_for_traces(server, collector, 4)
    roots = [span for span in collector.spans if span.name == "gateway"]
    errors = [span.status.code == Status.STATUS_CODE_ERROR for span in roots]
    assert errors == [False, True, True, False]


def request(timing: Timing | None, began_s: float = 0.0, ended_s: float = 10.0) -> TracedRequest:
    return TracedRequest("id", "/", "m", {}, began_s, ended_s, 200, None, timing, Usage(0, 0))


@pytest.mark.parametrize(
    ("timing", "expected"),
    [
        (None, []),
        (Timing(1.0), [("prompt", 1.0, 10.0), RECOVERY]),
        (Timing(1.0, 2.0), [("prompt", 1.0, 2.0), ("queue", 2.0, 10.0), RECOVERY]),
        (
            Timing(1.0, 2.0, 3.0, 5.0, 7.0),
            [
                ("prompt", 1, 2),
                ("encode", 2, 3),
                ("queue", 3, 5),
                ("prefill", 5, 7),
                ("decode", 7, 10),
                ("recovery", 4, 6),
            ],
        ),
        (
            Timing(1.0, 2.0, None, 5.0, 7.0, 9.0),
            [("prompt", 1, 2), ("queue", 2, 5), ("prefill", 5, 7), ("decode", 7, 9), RECOVERY],
        ),
    ],
)
def test_steps_follow_each_other_and_recoveries_stand_beside(timing: Timing | None, expected: list[Any]) -> None:
    assert [*phases(request(timing), [(4.0, 6.0), (11.0, 12.0)])] == [Phase(*each) for each in expected]


def test_a_recovery_is_shown_in_the_time_of_its_request() -> None:
    found = [*phases(request(Timing(1.0), began_s=1.0), [(0.0, 0.5), (0.5, 2.0), (9.0, 11.0)])]
    assert found[1:] == [Phase("recovery", 1.0, 2.0), Phase("recovery", 9.0, 10.0)]


def test_a_recovery_becomes_a_span(collector: Collector) -> None:
    engine = FakeEngine()
    with serving(engine, GatewayConfig(otlp_traces_endpoint=collector.url)) as server:
        now_s = time.monotonic()
        engine.measurements = Measurements(NOTHING, NOTHING, NOTHING, 0, 0, 0, ((now_s, now_s + 60.0),))
        server.post("/v1/chat/completions", json=CHAT)
        wait_for_traces(server, collector)
    assert "recovery" in [span.name for span in collector.spans]


def test_without_a_collector_requests_are_answered_and_the_server_ends() -> None:
    with serving(FakeEngine(), GatewayConfig(otlp_traces_endpoint="http://127.0.0.1:9")) as server:
        assert server.post("/v1/chat/completions", json=CHAT).status_code == 200
        app: Any = server.http.config.app
        began_s = time.monotonic()
    app.state.traces.close()
    assert time.monotonic() - began_s < 10


def test_without_the_extra_the_option_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"pip install 'mdi-llm\[tracing\]'"):
        check_files(GatewayConfig(otlp_traces_endpoint="http://127.0.0.1:4318"))


def test_an_endpoint_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"a collector is like http://127\.0\.0\.1:4318; got 'localhost:4318'"):
        GatewayConfig(otlp_traces_endpoint="localhost:4318")
