"""Mixed requests at a server of two nodes: every series moves, and times are those that clients measure.

Run with `-s` for the figures.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from testing.processes import node_processes, serving
from testing.waiting import wait_for

from mdi.checkpoint.hub import locate
from mdi.checkpoint.source import open_source
from mdi.planning.cache import token_bytes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.usefixtures("no_process_left")]

ROUTE = "/v1/chat/completions"
LENGTH = 1024
CACHE_TOKENS = 1152  # for one sequence of full length: several at once have to give way to each other
AT_ONCE = 8
REQUESTS = 96
USAGE = {"include_usage": True, "continuous_usage_stats": True}
GAUGES = {"vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc", "mdi:node_up"}
STILL = {"mdi:recovering", "mdi:failed_requests_total", "vllm:cache_config_info", *GAUGES}
WHOLE = [f"vllm:{name}" for name in ("e2e_request_latency_seconds", "request_prompt_tokens")]
STEPS = [f"vllm:request_{step}_time_seconds" for step in ("queue", "prefill", "decode", "inference")]

OF_ALL = ("model_name", "engine")  # labels
Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@dataclass(frozen=True)
class Seen:
    """A streamed answer, as its client saw it: seconds to its first tokens, between these and the last, and in all.

    tokens, first_tokens: of the answer, and those that came first.
    """

    first_s: float
    between_s: float
    whole_s: float
    prompt_tokens: int
    first_tokens: int
    tokens: int


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    config = open_source(locate("bundled", ckpt_folder=tmp_path)).model_config
    node_tokens = CACHE_TOKENS * token_bytes(config, "float32", -(-config.n_layers // 2))
    options = ("--n-nodes", "2", "--dtype", "float32", "--ckpt-folder", tmp_path, "--sequence-length", str(LENGTH))
    with serving("bundled", *options, "--kv-cache-gb", f"{node_tokens / 1e9:.9f}") as (_, url):
        yield url


def test_every_series_moves_and_agrees_with_the_clients(url: str) -> None:
    before = series(url)
    answers = asyncio.run(streams(url))
    after = series(url)
    agree(answers, {key: value - before.get(key, 0.0) for key, value in after.items()})
    asyncio.run(others(url))
    assert not unmoved(before, series(url))


def agree(answers: list[Seen], moved: Series) -> None:
    """Counts are the clients' exactly; times are theirs but for what the way takes."""
    n, tokens = len(answers), sum(answer.tokens for answer in answers)
    further = tokens - sum(answer.first_tokens for answer in answers)
    for name in (*WHOLE, *STEPS):
        assert moved[f"{name}_count", ()] == n, name
    assert moved["vllm:request_prompt_tokens_sum", ()] == sum(answer.prompt_tokens for answer in answers)
    assert moved["vllm:generation_tokens_total", ()] == moved["vllm:request_generation_tokens_sum", ()] == tokens
    assert moved["vllm:inter_token_latency_seconds_count", ()] == further
    steps = [moved[f"{name}_sum", ()] for name in STEPS]
    assert steps[1] + steps[2] == pytest.approx(steps[3])
    whole_s = moved["vllm:e2e_request_latency_seconds_sum", ()]
    assert steps[0] + steps[3] == pytest.approx(whole_s, rel=0.2, abs=0.1 * n)
    for name, seen_s in (
        ("vllm:time_to_first_token_seconds", sum(answer.first_s for answer in answers)),
        ("vllm:inter_token_latency_seconds", sum(answer.between_s for answer in answers)),
        ("vllm:e2e_request_latency_seconds", sum(answer.whole_s for answer in answers)),
    ):
        told_s, count = moved[f"{name}_sum", ()], moved[f"{name}_count", ()]
        print(f"{name}: {told_s / count:.6f} s, clients {seen_s / count:.6f} s: {told_s / seen_s - 1:+.2%}")
        assert told_s == pytest.approx(seen_s, rel=0.2, abs=0.1 * n), name


def unmoved(before: Series, after: Series) -> set[str]:
    """Names of series that no sample of has changed, but for those that only move while something is wrong."""
    moved = {name for (name, labels), value in after.items() if value != before.get((name, labels))}
    return {name for name, _ in after if not name.endswith("_bucket")} - moved - STILL


async def streams(url: str) -> list[Seen]:
    """Texts and pictures, streamed, some at a time."""
    limit = asyncio.Semaphore(AT_ONCE)
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:

        async def one(body: dict[str, Any]) -> Seen:
            async with limit:
                return await seen(client, body)

        return await asyncio.gather(*map(one, islice(cycle(bodies()), REQUESTS)))


def bodies() -> list[dict[str, Any]]:
    """One answer ends by itself, the others at a length; the pictures come again."""
    texts = [said(f"Please count to {number}, in words.", 128) for number in (3, 20, 100)]
    pictures = [said("What is this?", 96, picture(colour)) for colour in ("red", "blue", "green")]
    return [said("Hello!", 48), *({**body, "ignore_eos": True} for body in (*texts, *pictures))]


def said(text: str, max_tokens: int, *parts: dict[str, Any]) -> dict[str, Any]:
    message = {"role": "user", "content": [*parts, {"type": "text", "text": text}]}
    return {"model": "bundled", "messages": [message], "max_tokens": max_tokens, "temperature": 0}


def picture(colour: str) -> dict[str, Any]:
    data = io.BytesIO()
    Image.new("RGB", (112, 112), colour).save(data, "png")
    url = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


async def seen(client: httpx.AsyncClient, body: dict[str, Any]) -> Seen:
    began_s = time.perf_counter()
    times, usages = list[float](), list[dict[str, int]]()
    async for event in events(client, {**body, "stream": True, "stream_options": USAGE}):
        if event["choices"] and event["usage"]["completion_tokens"]:
            times.append(time.perf_counter() - began_s)
            usages.append(event["usage"])
    return Seen(
        times[0],
        times[-1] - times[0],
        time.perf_counter() - began_s,
        usages[-1]["prompt_tokens"],
        usages[0]["completion_tokens"],
        usages[-1]["completion_tokens"],
    )


async def events(client: httpx.AsyncClient, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    async with client.stream("POST", ROUTE, json=body) as streamed:
        streamed.raise_for_status()
        async for line in streamed.aiter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                yield json.loads(line.removeprefix("data: "))


async def others(url: str) -> None:
    """Long answers that take each other's place in the cache, a client that leaves, and a node that dies."""
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        longest = {**said("Tell me all.", 400), "ignore_eos": True, "temperature": 1.0, "seed": 1}
        running = [asyncio.create_task(client.post(ROUTE, json=longest | {"n": 2})) for _ in range(3)]
        async for _ in events(client, {**longest, "stream": True}):
            break
        await asyncio.sleep(0.5)
        [node] = await asyncio.to_thread(node_processes)
        os.kill(node.pid, signal.SIGKILL)
        for answer in await asyncio.gather(*running):
            assert answer.status_code == 200
    await asyncio.to_thread(wait_for, lambda: series(url)["mdi:recovery_seconds_count", ()] == 1, 30)


def series(url: str) -> Series:
    """Values by name and labels, but the model's name and the engine."""
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics").text)
    return {
        (sample.name, tuple(sorted(item for item in sample.labels.items() if item[0] not in OF_ALL))): sample.value
        for family in families
        for sample in family.samples
    }
