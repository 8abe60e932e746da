"""A thousand mixed requests over HTTP: texts, images, streams, samples, cancelled and bad requests.

    pip install -e '.[training]'
    python -m benchmarks.mixed                    # 1,000 requests, 32 at a time, the bundled model over two nodes
    python -m benchmarks.mixed --requests 60      # the same in short

Every answer is compared with that of the same request alone. In float32, a token does not depend on what else runs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import psutil
from rich.console import Console
from rich.progress import Progress
from testing.processes import serving
from training.held_out import all_skills, exams

from benchmarks.quality import openai_messages

ROUTE = "/v1/chat/completions"
PER_SKILL = 3
SETTLE_S = 2.0
PARTS = 5  # memory is measured after each
console = Console()


@dataclass(frozen=True)
class Good:
    """A request with an answer, streamed or not. leaves: the client disconnects after the first piece."""

    kind: str
    body: dict[str, Any]
    leaves: bool = False


@dataclass(frozen=True)
class Bad:
    """A request that is refused with status 400."""

    body: dict[str, Any]
    kind: str = "bad"


@dataclass(frozen=True)
class Outcome:
    kind: str
    error: str = ""


@dataclass(frozen=True)
class Weight:
    """Memory and open files of all the server's processes together."""

    resident_bytes: int
    descriptors: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--at-once", type=int, default=32)
    parser.add_argument("--n-nodes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    good = good_requests(chance)
    kinds: Sequence[Good | Bad] = [*good, *([*bad_requests()] * (len(good) // 20))]
    chosen = [chance.choice(kinds) for _ in range(options.requests)]
    with TemporaryDirectory(prefix="mdi-mixed-") as folder:
        flags = ("--n-nodes", str(options.n_nodes), "--dtype", "float32", "--ckpt-folder", folder)
        with serving("bundled", *flags) as (process, url):
            asyncio.run(soak(url, process.pid, good, chosen, options.at_once))


def good_requests(chance: random.Random) -> list[Good]:
    """Questions of every skill, and some without an image, each in several ways."""
    bodies = [
        ("image", {"messages": openai_messages(exam), "max_tokens": 48, "temperature": 0})
        for skill in all_skills()
        for exam in exams(skill, PER_SKILL)
    ]
    texts = ("Hello!", "What is a circle?", "Count to ten, please.", "wer bist du? \N{WAVING HAND SIGN}", "x" * 200)
    bodies += [
        ("text", {"messages": [{"role": "user", "content": text}], "max_tokens": 24, "temperature": 0})
        for text in texts
    ]
    requests = []
    for kind, body in bodies:
        warm = {**body, "temperature": 1.0, "seed": chance.randrange(2**31), "n": 2}
        requests += [
            Good(kind, body),
            Good(f"{kind}, sampled", warm),
            Good(f"{kind}, streamed", {**body, "stream": True}),
            Good(f"{kind}, cancelled", {**body, "stream": True}, leaves=True),
        ]
    return requests


def bad_requests() -> list[Bad]:
    """Requests that are refused for different reasons in different places."""

    def message(content: Any, **more: Any) -> Bad:
        return Bad({"messages": [{"role": "user", "content": content}], **more})

    broken = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGVsbG8="}}
    private = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/secret.png"}}
    return [
        message([broken, {"type": "text", "text": "What is it?"}]),
        message([private]),
        message("far too long " * 5000),
        message("x", temperature=-1),
        message("x", top_p=2),
        Bad({"messages": []}),
    ]


async def soak(url: str, pid: int, good: Sequence[Good], chosen: Sequence[Good | Bad], at_once: int) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=httpx.Limits(max_connections=at_once)) as client:
        with Progress(console=console) as progress:
            alone = progress.add_task("each alone", total=len(good))
            expected: dict[str, list[str]] = {}
            for request in good:
                if not request.leaves:
                    expected[key(request.body)] = await ask(client, request)
                progress.advance(alone)
            limit, task = asyncio.Semaphore(at_once), progress.add_task("all together", total=len(chosen))

            async def outcome(request: Good | Bad) -> Outcome:
                async with limit:
                    found = await check(client, request, expected)
                progress.advance(task)
                return found

            outcomes: list[Outcome] = []
            weights, seconds = [], 0.0
            for part in range(PARTS):
                started_s = time.perf_counter()
                outcomes += await asyncio.gather(*map(outcome, chosen[part::PARTS]))
                seconds += time.perf_counter() - started_s
                weights.append(await settled(pid))
        report(outcomes, seconds, weights)
        ready = (await client.get("/health/ready")).status_code
        console.print(f"ready afterwards: {ready == 200}")


async def settled(pid: int) -> Weight:
    """Memory and open files when nothing runs."""
    await asyncio.sleep(SETTLE_S)
    server = psutil.Process(pid)
    processes = [server, *server.children(recursive=True)]
    return Weight(
        sum(process.memory_info().rss for process in processes), sum(process.num_fds() for process in processes)
    )


async def check(client: httpx.AsyncClient, request: Good | Bad, expected: dict[str, list[str]]) -> Outcome:
    """The outcome of one request. Its `error` is empty when it is the right one."""
    try:
        if isinstance(request, Bad):
            status = (await client.post(ROUTE, json={"model": "bundled", **request.body})).status_code
            return Outcome(request.kind, "" if status == 400 else f"lost: status {status} instead of 400")
        found = await ask(client, request)
    except (httpx.HTTPError, RuntimeError) as error:
        return Outcome(request.kind, f"lost: {error!r}")
    wanted = expected[key(request.body)]
    same = wanted[0].startswith(found[0]) if request.leaves else found == wanted
    return Outcome(request.kind, "" if same else f"mixed up: {found}, alone {wanted}")


async def ask(client: httpx.AsyncClient, request: Good) -> list[str]:
    """The answer's texts; for a client that disconnects, the first piece."""
    body = {"model": "bundled", **request.body}
    if not body.get("stream"):
        response = await client.post(ROUTE, json=body)
        response.raise_for_status()
        return [choice["message"]["content"] for choice in response.json()["choices"]]
    text = ""
    async with client.stream("POST", ROUTE, json=body) as streamed:
        streamed.raise_for_status()
        async for line in streamed.aiter_lines():
            data = line.removeprefix("data: ")
            if data == line or data == "[DONE]":  # comments stand between events while an answer waits
                continue
            event = json.loads(data)
            if "error" in event:
                raise RuntimeError(event["error"]["message"])
            text += event["choices"][0]["delta"].get("content") or "" if event["choices"] else ""
            if text and request.leaves:
                break
    return [text]


def key(body: dict[str, Any]) -> str:
    """The settings that decide the answer, as text."""
    return json.dumps({name: value for name, value in body.items() if name != "stream"})


def report(outcomes: Sequence[Outcome], seconds: float, weights: Sequence[Weight]) -> None:
    """weights: after each part of the requests."""
    for kind, count in sorted(Counter(outcome.kind for outcome in outcomes).items()):
        console.print(f"{kind}: {count}")
    errors = [outcome for outcome in outcomes if outcome.error]
    for outcome in errors[:10]:
        console.print(f"{outcome.kind}: {outcome.error}", markup=False)
    lost = sum(outcome.error.startswith("lost") for outcome in errors)
    console.print(f"{len(outcomes)} requests in {seconds:.1f} s, {len(outcomes) / seconds:.1f} a second")
    console.print(f"lost requests: {lost}; mixed up: {len(errors) - lost}")
    memory = ", ".join(f"{weight.resident_bytes / 1e6:,.0f}" for weight in weights)
    descriptors = ", ".join(str(weight.descriptors) for weight in weights)
    console.print(f"after each {len(outcomes) // PARTS} of them, memory: {memory} MB; descriptors: {descriptors}")


if __name__ == "__main__":
    main()
