"""What a second replica brings: 64 streams to one and to two replicas of a model on a local Ray.

    pip install -e '.[bench,cluster,dev]'
    python -m benchmarks.replicas                 # the bundled model, replicas of one core: three minutes
    python -m benchmarks.replicas --model FOLDER  # another checkpoint: a larger one, beside which clients count less
    python -m benchmarks.replicas --streams 4 --turns 1

Each replica is one node with one thread. Clients, Ray's proxy and both replicas share this machine's cores: the target
of 1.8 times the rate needs cores for them beside those of the replicas.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from testing.links import free_port
from testing.processes import ENVIRONMENT, Process
from testing.ray_cluster import ray_cluster

from benchmarks.figures import Figure, report
from mdi.bench.scenario import Scenario

STREAMS = 64
PROMPT_TOKENS, ANSWER_TOKENS = 16, 128
TURNS = 3
LEAST = 1.8  # times the rate of one replica
MODEL = "served"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled", help="a checkpoint")
    parser.add_argument("--streams", type=int, default=STREAMS)
    parser.add_argument("--turns", type=int, default=TURNS, help="of which the best counts, after one that does not")
    parser.add_argument("--json", type=Path, help="write the table there, too")
    options = parser.parse_args()
    scenario = Scenario(options.streams, PROMPT_TOKENS, None, ANSWER_TOKENS)
    title = f"{options.streams} streams, replicas of one core on {len(os.sched_getaffinity(0))} cores"
    report(figures(options.model, scenario, options.turns), title, options.json)


def figures(model: str, scenario: Scenario, turns: int) -> Iterator[Figure]:
    """The rate of one replica, and of two."""
    os.environ |= {"RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    with ray_cluster(2, cpus=1) as cluster:
        one = rate(1, model, cluster.address, scenario, turns)
        yield Figure("", "1 replica", f"{one:.0f} tokens/s")
        two = rate(2, model, cluster.address, scenario, turns)
        yield Figure("", "2 replicas", f"{two:.0f} tokens/s", f"1 replica {one:.0f}", two / one, LEAST)


def rate(count: int, model: str, address: str, scenario: Scenario, turns: int) -> float:
    """Tokens a second; the best of some turns, after one that does not count."""
    with served(count, model, address, scenario.streams) as url:
        return max([asyncio.run(measure(url, scenario, seed)) for seed in range(turns + 1)][1:])


@contextmanager
def served(count: int, model: str, address: str, streams: int) -> Iterator[str]:
    """A command with so many replicas."""
    port = free_port()
    words = ("serve", model, "--ray", address, "--replicas", str(count), "--port", str(port), "--n-nodes", "1")
    resources = ("--ray-resources", "CPU=1", "--max-sequences", str(streams), "--sequence-length", "512")
    process = Process((*words, *resources, "--served-model-name", MODEL), ENVIRONMENT)
    try:
        assert process.popen.stdout
        if not process.popen.stdout.readline():
            raise SystemExit("".join(process.lines))
        yield f"http://127.0.0.1:{port}"
        process.popen.terminate()
        process.popen.wait(60)
    finally:
        process.kill()


async def measure(url: str, scenario: Scenario, seed: int) -> float:
    """Tokens a second, from the first request until the last answer's end."""
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=None)) as client:
        began = time.perf_counter()
        await asyncio.gather(*(stream(client, scenario, messages) for messages in scenario.prompts(seed)))
        return scenario.streams * scenario.answer_tokens / (time.perf_counter() - began)


async def stream(client: httpx.AsyncClient, scenario: Scenario, messages: list[dict[str, str]]) -> None:
    """One streamed answer, read to its end."""
    body = {"model": MODEL, "messages": messages, "max_tokens": scenario.answer_tokens, "temperature": 0}
    settings = {"stream": True, "ignore_eos": True}
    async with client.stream("POST", "/v1/chat/completions", json=body | settings) as response:
        last = ""
        async for line in response.aiter_lines():
            last = line or last
    if last != "data: [DONE]":
        raise SystemExit(f"a stream broke off: {last}")


if __name__ == "__main__":
    main()
