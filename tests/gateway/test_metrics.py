"""GET /metrics: vLLM's series move with requests, nodes and losses are told, and strangers do not see them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from testing.fakes import HOLD, FakeEngine, piece
from testing.waiting import wait_for

from mdi.core.config import GatewayConfig
from mdi.core.errors import ConfigError, LinkError
from mdi.core.histogram import Distribution
from mdi.core.outputs import Timing
from mdi.core.status import CacheStatus, Measurements, NodeStatus, RecoveryStatus
from mdi.gateway.app import create_app
from mdi.gateway.engine_series import link_bytes
from mdi.gateway.metrics import Metrics, joined, token_buckets
from tests.gateway.conftest import CHAT, HELLO, Server, serving

Sample = tuple[str, tuple[tuple[str, str], ...]]
STEPS = ("queue", "prefill", "decode", "inference")


@pytest.fixture
def server() -> Iterator[Server[FakeEngine]]:
    with serving(FakeEngine()) as server:
        yield server


def series(text: str) -> dict[Sample, float]:
    """Values by name and labels, but the model's name and the engine."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = {name: value for name, value in sample.labels.items() if name not in ("model_name", "engine")}
            found[sample.name, tuple(sorted(labels.items()))] = sample.value
    return found


def moved(server: Server[FakeEngine], before: dict[Sample, float], name: str, **labels: str) -> float:
    key = (name, tuple(sorted(labels.items())))
    return series(server.get("/metrics").text)[key] - before[key]


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_moves_the_series(server: Server[FakeEngine], stream: bool) -> None:
    server.engine.says(piece("a"), piece("b"), piece("c", "stop"))
    before = series(server.get("/metrics").text)
    assert server.post("/v1/chat/completions", json={**CHAT, "stream": stream}).status_code == 200
    assert moved(server, before, "vllm:request_success_total", finished_reason="stop") == 1
    assert moved(server, before, "vllm:request_success_total", finished_reason="abort") == 0
    assert moved(server, before, "vllm:generation_tokens_total") == 3
    assert moved(server, before, "vllm:time_to_first_token_seconds_count") == 1
    assert moved(server, before, "vllm:inter_token_latency_seconds_count") == 2
    assert moved(server, before, "vllm:e2e_request_latency_seconds_count") == 1
    assert moved(server, before, "vllm:request_generation_tokens_sum") == 3
    assert moved(server, before, "vllm:request_max_num_generation_tokens_sum") == 3
    assert moved(server, before, "vllm:request_prompt_tokens_sum") == 7
    assert moved(server, before, "vllm:prompt_tokens_total") == 7
    assert moved(server, before, "vllm:prefix_cache_queries_total") == 7
    for step in STEPS:
        assert moved(server, before, f"vllm:request_{step}_time_seconds_count") == 1


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": ["a", "b"], "n": 2}),
        ("/v1/responses", {"input": "a"}),
        ("/v1/messages", {"messages": HELLO, "max_tokens": 8}),
        ("/generate", {"prompt": "a"}),
    ],
)
def test_every_route_that_answers_is_counted(server: Server[FakeEngine], path: str, body: dict[str, object]) -> None:
    before = series(server.get("/metrics").text)
    model = {} if path == "/generate" else {"model": "fake"}
    assert server.post(path, json={**model, **body}).status_code == 200
    answers = 4 if path == "/v1/completions" else 1
    assert moved(server, before, "vllm:request_success_total", finished_reason="stop") == answers
    assert moved(server, before, "vllm:e2e_request_latency_seconds_count") == 1
    assert moved(server, before, "vllm:request_inference_time_seconds_count") == 1


def test_times_of_steps_are_those_that_the_engine_noted() -> None:
    engine = FakeEngine()
    metrics = Metrics(engine, "m")
    stream = engine.submit("a")
    stream.timing = Timing(10.0, prepared_s=11.0, scheduled_s=13.0, first_token_s=13.5, last_token_s=15.0)

    async def read() -> None:
        async for _ in metrics.observed(stream, time.monotonic() - 5.0):
            pass

    asyncio.run(read())
    found = series(metrics.text())
    times = {step: found[f"vllm:request_{step}_time_seconds_sum", ()] for step in STEPS}
    assert times == {"queue": 3.0, "prefill": 0.5, "decode": 1.5, "inference": 2.0}
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds"):
        assert 5.0 <= found[f"vllm:{name}_sum", ()] < 6.0


def test_a_client_that_leaves_and_a_lost_node_are_aborts(server: Server[FakeEngine]) -> None:
    before = series(server.get("/metrics").text)
    server.engine.says(piece("a"), HOLD)
    with httpx.stream(
        "POST", f"{server.url}/v1/chat/completions", json={**CHAT, "stream": True}, headers=server.headers
    ) as answer:
        next(answer.iter_lines())
    wait_for(lambda: moved(server, before, "vllm:request_success_total", finished_reason="abort") == 1, 5)
    server.engine.says(piece("a"), LinkError("lost"))
    server.post("/v1/chat/completions", json=CHAT)
    assert moved(server, before, "vllm:request_success_total", finished_reason="abort") == 2
    assert moved(server, before, "vllm:e2e_request_latency_seconds_count") == 0


def test_nodes_and_losses_are_told(server: Server[FakeEngine]) -> None:
    server.engine.recovery = RecoveryStatus(recovering=True, recoveries=2, failed_requests=3)
    server.engine.cache = CacheStatus(used_share=0.25, preemptions=4)
    told = series(server.get("/metrics").text)
    assert told["mdi:node_up", (("node", "starter"), ("state", "ready"))] == 1
    assert told["mdi:node_resident_bytes", (("node", "starter"),)] == 1000
    assert told["mdi:node_sent_bytes_total", (("node", "starter"),)] == 20
    assert (told["vllm:kv_cache_usage_perc", ()], told["vllm:num_preemptions_total", ()]) == (0.25, 4)
    assert (told["mdi:recovering", ()], told["mdi:recoveries_total", ()]) == (1, 2)
    assert (told["vllm:num_requests_running", ()], told["vllm:num_requests_waiting", ()]) == (0, 0)


def test_what_the_engine_measured_is_shown() -> None:
    engine = FakeEngine()
    engine.measurements = Measurements(
        Distribution((1, 8), (2, 1, 1), 30.0),
        Distribution((0.5,), (3, 0), 0.75),
        Distribution((1.0,), (0, 2), 9.0),
        replayed_tokens=40,
        media_queries=5,
        media_hits=2,
    )
    found = series(Metrics(engine, "m").text())
    name = "vllm:iteration_tokens_total"
    buckets = [found[f"{name}_bucket", (("le", bound),)] for bound in ("1.0", "8.0", "+Inf")]
    assert (buckets, found[f"{name}_sum", ()], found[f"{name}_count", ()]) == ([2, 3, 4], 30, 4)
    assert (found["mdi:vision_encode_seconds_sum", ()], found["mdi:vision_encode_seconds_count", ()]) == (0.75, 3)
    assert (found["mdi:recovery_seconds_sum", ()], found["mdi:recovery_seconds_count", ()]) == (9, 2)
    assert found["mdi:replayed_tokens_total", ()] == 40
    assert (found["vllm:mm_cache_queries_total", ()], found["vllm:mm_cache_hits_total", ()]) == (5, 2)
    [layout] = [dict(labels) for name, labels in found if name == "vllm:cache_config_info"]
    assert (layout["block_size"], layout["num_gpu_blocks"], layout["cache_dtype"]) == ("16", "64", "float32")


def node(name: str, sent: int, received: int, **place: Any) -> NodeStatus:
    return NodeStatus(name, "ready", 0, 1, "float32", "cpu", 1, 1, 0.0, sent, received, round_trip_s=0.25, **place)


MACHINES = [
    node("starter", 300, 30, group=0, steps=4, step_s=0.5),
    node("secondary0", 310, 290, group=1, role="secondary"),
    node("finisher", 31, 305, group=2, role="finisher"),
    node("spare1", 0, 0, role="spare"),
    node("vision", 7, 9, role="vision"),
]


def test_each_link_has_its_bytes_and_its_round_trip() -> None:
    """Results go from the last node of the pipeline to the starter; a vision node stands beside it."""
    assert link_bytes(MACHINES) == {
        ("starter", "secondary0"): 290,
        ("secondary0", "finisher"): 305,
        ("finisher", "starter"): 30,
        ("starter", "vision"): 9,
        ("vision", "starter"): 7,
    }
    assert link_bytes(MACHINES[:1]) == {}
    rank = node("secondary1", 80, 90, group=1, rank=1, role="secondary", group_received_bytes=90)
    leader = replace(MACHINES[1], rank=0, received_bytes=290 + 80, group_received_bytes=80)
    assert link_bytes([MACHINES[0], leader, rank, *MACHINES[2:]]) == link_bytes(MACHINES)
    engine = FakeEngine()
    engine.statuses = MACHINES
    found = series(Metrics(engine, "m").text())
    assert found["mdi:link_bytes_total", (("from", "finisher"), ("to", "starter"))] == 30
    assert found["mdi:link_round_trip_seconds", (("from", "starter"), ("to", "vision"))] == 0.25


def test_each_node_of_the_pipeline_has_the_times_of_its_steps() -> None:
    engine = FakeEngine()
    engine.statuses = MACHINES
    found = series(Metrics(engine, "m").text())
    assert found["mdi:node_step_seconds_count", (("node", "starter"),)] == 4
    assert found["mdi:node_step_seconds_sum", (("node", "starter"),)] == 0.5
    assert ("mdi:node_step_seconds_sum", (("node", "vision"),)) not in found


def test_labels_and_buckets_are_those_of_vllm() -> None:
    text = Metrics(FakeEngine(), "m").text()
    assert 'vllm:prompt_tokens_total{engine="0",model_name="m"} 0.0' in text
    assert 'vllm:request_prompt_tokens_bucket{engine="0",le="500.0",model_name="m"}' in text
    assert token_buckets(600) == [1, 2, 5, 10, 20, 50, 100, 200, 500]


def test_replicas_are_one_text() -> None:
    first, second = (Metrics(FakeEngine(), "m", name) for name in "ab")
    first.generated(3)
    text = joined([first.text(), second.text()])
    assert text.count("# TYPE vllm:generation_tokens_total counter") == 1
    assert 'vllm:generation_tokens_total{engine="a",model_name="m"} 3.0' in text
    assert 'vllm:generation_tokens_total{engine="b",model_name="m"} 0.0' in text
    for type_ in ("vllm:iteration_tokens_total histogram", "mdi:node_step_seconds summary"):
        assert text.count(f"# TYPE {type_}") == 1
    assert 'vllm:iteration_tokens_total_bucket{engine="b",le="+Inf",model_name="m"} 0.0' in text


@pytest.mark.parametrize(
    ("bound", "named", "status"),
    [("127.0.0.1", "localhost", 200), ("127.0.0.1", "rebound.example", 401), ("0.0.0.0", "localhost", 401)],
)
def test_only_on_loopback_they_need_no_key(bound: str, named: str, status: int) -> None:
    app = create_app(FakeEngine(), GatewayConfig(host=bound, api_keys=("k",)))

    async def answer(**headers: str) -> int:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url=f"http://{named}", headers=headers) as client:
            return (await client.get("/metrics")).status_code

    assert asyncio.run(answer()) == status
    assert asyncio.run(answer(authorization="Bearer k")) == 200


def test_the_metrics_key_opens_them_and_nothing_else() -> None:
    app = create_app(FakeEngine(), GatewayConfig(host="0.0.0.0", api_keys=("k",), metrics_key="schlüssel"))

    async def statuses(key: str) -> list[int]:
        transport, headers = httpx.ASGITransport(app), httpx.Headers({b"x-api-key": key.encode()})
        async with httpx.AsyncClient(transport=transport, base_url="http://mdi.example", headers=headers) as client:
            got = [(await client.get(path)).status_code for path in ("/metrics", "/v1/nodes", "/metrics/")]
            return [*got, (await client.post("/v1/chat/completions", json=CHAT)).status_code]

    assert asyncio.run(statuses("schlüssel")) == [200, 401, 401, 401]
    assert asyncio.run(statuses("k"))[:2] == [200, 200]
    assert asyncio.run(statuses("schluessel"))[0] == 401


@pytest.mark.parametrize("config", [{"metrics_key": "m"}, {"metrics_key": "", "api_keys": ("k",)}])
def test_a_metrics_key_that_protects_nothing_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="--metrics-key needs a value, and --api-key or --api-keys"):
        GatewayConfig(**config)
