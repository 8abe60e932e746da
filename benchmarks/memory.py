"""Memory of a server's processes over many requests: texts, distinct images and videos, clients that leave, bad ones.

    python -m benchmarks.memory                   # 10,000 requests to a tiny random model over two nodes
    python -m benchmarks.memory --requests 300    # the same in short
    python -m benchmarks.memory --model bundled

After every hundredth of the requests (of few: after ten) nothing runs for a moment, and the memory that each process
has for itself (USS) is read. The slope is the line of least squares through the last half of these points. No
embeddings are kept (--vision-cache-mb 0), so what grows is a leak, or memory that the allocator does not give back.
Target: less than 1,000 bytes a request. memory.png shows the points. Exit code 1 for an answer that is not the
expected one.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import numpy as np
import psutil
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from testing.checkpoints import tiny_config
from testing.processes import serving
from testing.videos import encoded

from mdi.bench.scenario import noise
from mdi.checkpoint.random_weights import write_random_checkpoint

ROUTE = "/v1/chat/completions"
N_NODES = 2
N_POINTS = 100
LEAST_BLOCK = 10  # requests between two points
SIDES = (56, 112, 224, 336)  # of images, in pixels
KINDS = {"text": 45, "image": 38, "video": 3, "leaves": 7, "bad": 7}  # in a hundred
EXPECTED = {f"{kind}: 200" for kind in ("text", "image", "video")} | {
    "bad: 400",
    "leaves: left",
    "leaves: left after the first event",
}
TARGET_BYTES = 1000  # a request
SETTLE_S = 0.2
console = Console()


@dataclass
class Log:
    """Own memory in bytes of each process, by its name, and how many requests had ended then."""

    requests: list[int] = field(default_factory=list)
    size_bytes: dict[str, list[int]] = field(default_factory=dict)

    def slope(self, name: str) -> float:
        """Bytes a request, over the last half."""
        half = len(self.requests) // 2
        slope, _ = np.polyfit(self.requests[half:], self.size_bytes[name][half:], 1)
        return float(slope)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=3600, help="no new requests after this time")
    parser.add_argument("--at-once", type=int, default=16)
    parser.add_argument("--model", help="a checkpoint; a tiny random one if not given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, default=Path("memory.png"))
    options = parser.parse_args()
    with TemporaryDirectory(prefix="mdi-memory-") as folder:
        model = options.model or write_random_checkpoint(Path(folder) / "tiny", tiny_config())
        flags = ("--n-nodes", str(N_NODES), "--sequence-length", "1024", "--vision-cache-mb", "0")
        with serving(model, *flags, "--ckpt-folder", folder) as (process, url):
            started_s = time.monotonic()
            log, outcomes = asyncio.run(soak(url, process.pid, options))
            seconds = time.monotonic() - started_s
    plot(log).savefig(options.plot, dpi=120)
    report(log, outcomes, seconds)
    console.print(f"plot: {options.plot}")
    sys.exit(bool(set(outcomes) - EXPECTED))


async def soak(url: str, pid: int, options: argparse.Namespace) -> tuple[Log, Counter[str]]:
    log, outcomes, n_requests = Log(), Counter[str](), options.requests
    chosen, until_s = requests(random.Random(options.seed)), time.monotonic() + options.seconds
    limits = httpx.Limits(max_connections=options.at_once)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        with Progress(console=Console(stderr=True)) as progress:
            task = progress.add_task("requests", total=n_requests)
            limit = asyncio.Semaphore(options.at_once)

            async def one(kind: str, body: dict[str, Any]) -> None:
                async with limit:
                    outcomes[f"{kind}: {await ask(client, kind, {'model': model, **body})}"] += 1
                progress.advance(task)

            block = max(LEAST_BLOCK, n_requests // N_POINTS)
            for first in range(0, n_requests, block):
                some = [next(chosen) for _ in range(min(block, n_requests - first))]
                await asyncio.gather(*(one(kind, body) for kind, body in some))
                await asyncio.sleep(SETTLE_S)
                measure(log, first + len(some), pid)
                if time.monotonic() > until_s:
                    break
    return log, outcomes


def requests(chance: random.Random) -> Iterator[tuple[str, dict[str, Any]]]:
    """Kinds and bodies; no two images are the same."""
    while True:
        [kind] = chance.choices(list(KINDS), list(KINDS.values()))
        pixels = np.random.default_rng(chance.getrandbits(32))
        content: list[dict[str, Any]] = [{"type": "text", "text": "What is this? " * chance.randint(1, 12)}]
        if kind == "video" or (kind == "leaves" and chance.random() < 0.2):
            frames = [Image.fromarray(frame) for frame in pixels.integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)]
            content.insert(0, part("video", encoded(frames, "mp4", "mpeg4")))
        elif kind == "image" or (kind == "leaves" and chance.random() < 0.6):
            content.insert(0, part("image", noise(chance.choice(SIDES), pixels)))
        elif kind == "bad":
            content.insert(0, part("image", pixels.bytes(chance.randint(1, 100_000))))
        yield (
            kind,
            {
                "messages": [{"role": "user", "content": content}],
                "max_tokens": chance.randint(1, 8),
                "temperature": chance.choice((0, 1)),
                "stream": kind == "leaves" or chance.random() < 0.5,
            },
        )


def part(kind: str, data: bytes) -> dict[str, Any]:
    media_type = {"image": "image/png", "video": "video/mp4"}[kind]
    url = f"data:{media_type};base64,{base64.b64encode(data).decode()}"
    return {"type": f"{kind}_url", f"{kind}_url": {"url": url}}


async def ask(client: httpx.AsyncClient, kind: str, body: dict[str, Any]) -> str:
    """The status of the answer; a client that leaves does so soon after it has asked, or after the first event."""
    try:
        async with asyncio.timeout(body["max_tokens"] / 50 if kind == "leaves" else None):
            async with client.stream("POST", ROUTE, json=body) as answer:
                last = ""
                async for text in answer.aiter_text():
                    last = text
                    if kind == "leaves":
                        return "left after the first event"
                in_stream = answer.status_code == 200 and '"error"' in last  # found after the stream began
                return "400" if in_stream else str(answer.status_code)
    except TimeoutError:
        return "left"


def measure(log: Log, n_requests: int, pid: int) -> None:
    server = psutil.Process(pid)
    nodes = [child for child in server.children(recursive=True) if "secondary" in child.cmdline()]
    log.requests.append(n_requests)
    for name, process in (("starter", server), *((f"node {index}", node) for index, node in enumerate(nodes, 1))):
        log.size_bytes.setdefault(name, []).append(process.memory_full_info().uss)


def plot(log: Log) -> Figure:
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="requests", ylabel="MB of its own", title="memory of each process")
    for name, size_bytes in log.size_bytes.items():
        label = f"{name}: {log.slope(name):,.0f} bytes a request"
        axes.plot(log.requests, [size / 1e6 for size in size_bytes], label=label)
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


def report(log: Log, outcomes: Counter[str], seconds: float) -> None:
    for outcome, count in sorted(outcomes.items()):
        console.print(f"{outcome}: {count}")
    console.print(f"{outcomes.total()} requests in {seconds:.0f} s, {outcomes.total() / seconds:.1f} a second")
    table = Table("process", "first MB", "half way", "last", "bytes a request", title="own memory (USS)")
    for name, sizes in log.size_bytes.items():
        shown = (sizes[0], sizes[len(sizes) // 2], sizes[-1])
        table.add_row(name, *(f"{size / 1e6:,.1f}" for size in shown), f"{log.slope(name):,.0f}")
    console.print(table)
    growing = [name for name in log.size_bytes if log.slope(name) > TARGET_BYTES]
    console.print(f"above {TARGET_BYTES} bytes a request: {', '.join(growing) or 'none'}")


if __name__ == "__main__":
    main()
