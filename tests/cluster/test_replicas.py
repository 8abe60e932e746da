"""Replicas on a real Ray cluster: whole pipelines behind one address, which Ray Serve routes, replaces and updates."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from testing.links import free_port
from testing.processes import ENVIRONMENT, Process, mdi
from testing.waiting import wait_for

from mdi import Engine, SamplingParams
from mdi.checkpoint.bundled import SHIPPED

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(400), pytest.mark.filterwarnings("default")]

OPTIONS = ("--dtype", "float32", "--n-nodes", "2", "--ray-resources", "CPU=1,memory=1e9", "--sequence-length", "512")
PROMPTS = [f"Tell me about number {number}." for number in range(12)]
MAX_TOKENS = 200
LONG_PROMPT = "Seventeen is a number with many friends. " * 8


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from testing.ray_cluster import ray_cluster

    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patched.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patched.setenv("RAY_worker_niceness", "0")
        with ray_cluster(3, cpus=2) as cluster:
            yield cluster


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def server(cluster: Any, port: int) -> Iterator[Process]:
    process = deployed(cluster, port)
    yield process
    process.kill()


def deployed(cluster: Any, port: int, *options: str) -> Process:
    words: tuple[str | Path, ...] = ("serve", SHIPPED, "--ray", cluster.address, "--replicas", "2", "--port", str(port))
    process = Process((*words, *OPTIONS, "--served-model-name", "bundled", "--api-key", "k", *options), ENVIRONMENT)
    assert process.popen.stdout
    assert "serving bundled at" in process.popen.stdout.readline(), "".join(process.lines)
    return process


@pytest.fixture(scope="module")
def alone() -> list[str]:
    """What one process answers."""
    with Engine(SHIPPED, dtype="float32", sequence_length=512) as engine:
        streams = [engine.submit(prompt, params(seed)) for seed, prompt in enumerate(PROMPTS)]
        return [stream.completion().text for stream in streams]


def params(seed: int) -> SamplingParams:
    return SamplingParams(temperature=1, seed=seed, max_tokens=MAX_TOKENS, ignore_eos=True)


def client(port: int, session: str = "", **settings: Any) -> openai.OpenAI:
    headers = {"x-session-id": session} if session else {}
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="k", default_headers=headers, **settings)


def ask(port: int, number: int, started: threading.Event | None = None) -> str:
    """One streamed answer. started: set at its first text."""
    with client(port, max_retries=0) as asking:
        chunks = asking.chat.completions.create(
            model="bundled",
            messages=[{"role": "user", "content": PROMPTS[number]}],
            temperature=1,
            seed=number,
            max_tokens=MAX_TOKENS,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        text = ""
        for chunk in chunks:
            text += chunk.choices[0].delta.content or ""
            if text and started:
                started.set()
        return text


def ask_all(port: int, count: int = len(PROMPTS)) -> list[str]:
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda number: ask(port, number), range(count)))


def starters() -> list[psutil.Process]:
    """The processes of replicas."""
    found = [
        process
        for process in psutil.process_iter(["cmdline"])
        if "ServeReplica" in " ".join(process.info["cmdline"] or [])
    ]
    return [process for process in found if process.status() != psutil.STATUS_ZOMBIE]


def get(port: int, path: str, session: str = "") -> httpx.Response:
    headers = {"authorization": "Bearer k"} | ({"x-session-id": session} if session else {})
    return httpx.get(f"http://127.0.0.1:{port}{path}", headers=headers, timeout=30)


def test_replicas_answer_as_one_server_does(server: Process, port: int, alone: list[str]) -> None:
    assert len(starters()) == 2
    assert ask_all(port) == alone
    health = get(port, "/health")
    assert (health.status_code, health.headers["x-content-type-options"]) == (200, "nosniff")
    assert len(health.headers.get_list("x-request-id")) == 1
    refused = httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json={})
    assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")


def test_nodes_name_their_replica(server: Process, port: int) -> None:
    report = get(port, "/v1/nodes").json()
    assert sorted(node["name"] for node in report["nodes"]) == ["finisher", "finisher", "starter", "starter"]
    assert {node["pid"] for node in report["nodes"] if node["name"] == "starter"} == {p.pid for p in starters()}
    by_replica = {node["replica"]: node["name"] for node in report["nodes"]}
    assert len(by_replica) == 2
    assert (report["recovering"], report["failed_requests"]) == (False, 0)
    told = get(port, "/metrics").text
    assert set(re.findall(r'mdi:node_up{engine="([^"]+)"', told)) == set(by_replica)
    assert sum(map(float, re.findall(r"vllm:generation_tokens_total{.*} (.*)", told))) >= len(PROMPTS) * MAX_TOKENS


def test_a_session_stays_with_its_replica(server: Process, port: int) -> None:
    for session in "abcdef":  # three in a hundred that all of them fall on one replica
        cached = []
        for _ in range(4):
            with client(port, session) as asking:
                messages: Any = [{"role": "user", "content": f"{session} {LONG_PROMPT}"}]
                answer = asking.chat.completions.create(model="bundled", messages=messages, max_tokens=1)
            assert answer.usage
            assert answer.usage.prompt_tokens_details
            cached.append(answer.usage.prompt_tokens_details.cached_tokens or 0)
        assert cached[0] < 40
        assert min(cached[1:]) > 40


def test_a_client_that_leaves_ends_its_request(server: Process, port: int) -> None:
    with client(port, "s") as asking:
        messages: Any = [{"role": "user", "content": "hi"}]
        more = {"ignore_eos": True}
        chunks = asking.chat.completions.create(
            model="bundled", messages=messages, max_tokens=450, n=8, stream=True, extra_body=more
        )
        next(iter(chunks))
        assert get(port, "/load", "s").json()["running"] > 0
        chunks.close()
    wait_for(lambda: get(port, "/load", "s").json()["running"] == 0, 2)


def test_a_killed_replica_is_replaced_and_a_retry_has_the_same_text(
    server: Process, port: int, alone: list[str]
) -> None:
    started = [threading.Event() for _ in PROMPTS]
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        asked = [pool.submit(ask, port, number, started[number]) for number in range(len(PROMPTS))]
        for event in started:
            event.wait(60)
        os.kill(starters()[0].pid, signal.SIGKILL)
        failures = [answer.exception() for answer in asked]
    assert any(failures)  # in one of 4,096 runs each, all streams were on the one or on the other
    assert not all(failures)
    for number, failure in enumerate(failures):
        assert failure or asked[number].result() == alone[number]
        assert failure is None or isinstance(failure, (openai.APIError, httpx.TransportError)), failure
    wait_for(lambda: len(starters()) == 2 and len(get(port, "/v1/nodes").json().get("nodes", ())) == 4, 120)
    assert ask_all(port) == alone


def test_another_port_than_that_of_serve_is_refused(cluster: Any, server: Process, port: int) -> None:
    refused = mdi("serve", SHIPPED, "--ray", cluster.address, "--replicas", "1", "--port", str(free_port()))
    assert refused.returncode == 2
    assert f"Ray Serve runs on this cluster already, with port {port}" in refused.stderr


def test_an_update_under_load_loses_no_request(cluster: Any, server: Process, port: int, alone: list[str]) -> None:
    before = {starter.pid for starter in starters()}
    with ThreadPoolExecutor(1) as pool:
        updating = pool.submit(deployed, cluster, port, "--max-sequences", "8")
        while not updating.done():  # few at once: new replicas start beside them
            assert ask_all(port, 3) == alone[:3]
        again = updating.result()
    assert server.popen.wait(60) == 0
    assert "another command took over bundled" in "".join(server.lines)
    wait_for(lambda: not before & {starter.pid for starter in starters()}, 60)
    assert ask_all(port) == alone
    check_that_full_queues_refuse(port)
    again.popen.terminate()
    assert again.popen.wait(60) == 0
    again.kill()
    wait_for(lambda: not starters(), 30)


def check_that_full_queues_refuse(port: int) -> None:
    """Each replica takes 256 requests; of more, some are refused as by a single server."""
    answers = asyncio.run(post_at_once(port, 900))
    assert {answer.status_code for answer in answers} == {200, 429}
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert refused.headers["retry-after"]
    assert "256 requests are running or waiting already" in refused.json()["error"]["message"]


async def post_at_once(port: int, count: int) -> list[httpx.Response]:
    body = {"model": "bundled", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 12, "ignore_eos": True}
    settings: Any = {"timeout": 120, "limits": httpx.Limits(max_connections=None)}
    async with httpx.AsyncClient(headers={"authorization": "Bearer k"}, **settings) as asking:
        url = f"http://127.0.0.1:{port}/v1/chat/completions"
        return await asyncio.gather(*(asking.post(url, json=body) for _ in range(count)))
