"""How fast the page is in Chromium: when it is painted first, and whether a fast answer costs it frames.

    python -m benchmarks.page             # 20 openings, and an answer of 256 tokens a second for ten seconds
    python -m benchmarks.page --short     # in seconds

The server is a process of its own in front of a stub engine. A frame is dropped when the next one comes later than one
and a half times the usual gap, which an idle page shows first: without a screen, Chromium draws 60 a second.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from playwright.sync_api import Page
from rich.console import Console
from testing.browser import Tab, chromium, tab
from testing.fakes import FakeEngine, piece

from mdi.cli.parent import end_with_parent
from mdi.core.config import GatewayConfig
from mdi.engine import Stream
from mdi.gateway.server import bind, serve

TOKENS_A_SECOND = 256
PARAGRAPH = (
    "The **starter** takes the picture, and `secondary0` the layers in the middle. It is written in Markdown, with "
    "[links](https://example.org/), lists and code, as answers of models are:\n\n- one thing\n- another *thing*\n\n"
    "```python\nfor token in stream:\n    print(token)\n```\n\n"
)
TIMES = """() => ["first-contentful-paint", "drawn"].map((name) => performance.getEntriesByName(name)[0].startTime)"""
RECORD_FRAMES = """() => {
    const frames = window.frames = [];
    const note = (at) => {
        frames.push(at);
        if (frames === window.frames) requestAnimationFrame(note);
    };
    requestAnimationFrame(note);
}"""
console = Console()


@dataclass(frozen=True)
class Sizes:
    """openings: of the page, each in a new profile. seconds: of the answer."""

    openings: int = 20
    seconds: float = 10.0


class FastEngine(FakeEngine):
    """Every answer is Markdown at the rate of `TOKENS_A_SECOND`; max_tokens says how much."""

    def submit(self, prompt: Any, params: Any = None, **settings: Any) -> Stream:
        stream = Stream(lambda: None)
        threading.Thread(target=_fill, args=(stream, params.max_tokens), daemon=True).start()
        return stream


def _fill(stream: Stream, count: int) -> None:
    words = PARAGRAPH.split(" ")
    began = time.monotonic()
    for index in range(count):
        time.sleep(max(0.0, began + index / TOKENS_A_SECOND - time.monotonic()))
        stream.put(piece(words[index % len(words)] + " ", "length" if index == count - 1 else None))
    stream.put(None)


def main() -> None:
    arguments = _arguments()
    if arguments.serve:
        end_with_parent()
        serve(FastEngine(), bind("127.0.0.1", 0), GatewayConfig())
        return
    sizes = Sizes(openings=3, seconds=2.0) if arguments.short else Sizes()
    with _server() as url, chromium() as browser:
        times = []
        for _ in range(sizes.openings):
            with tab(browser, url) as opened:
                times.append(opened.open().page.evaluate(TIMES))
        for name, seen in zip(("first paint (target 300 ms)", "all controls"), zip(*times, strict=True), strict=True):
            console.print(
                f"{name}, {sizes.openings} openings: median {statistics.median(seen):.0f} ms, worst {max(seen):.0f} ms"
            )
        with tab(browser, url) as opened:
            _measure_frames(opened.open(), sizes)


def _measure_frames(opened: Tab, sizes: Sizes) -> None:
    count = round(TOKENS_A_SECOND * sizes.seconds)
    page = opened.page
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Most tokens of an answer").fill(str(count))
    page.get_by_role("button", name="Close").click()
    page.wait_for_timeout(1000)
    idle = _frames(page, lambda: page.wait_for_timeout(2000))
    usual = statistics.median(idle)
    opened.ask("Tell me.")
    gaps = _frames(page, opened.answer_ended)
    for name, seen in (("idle", idle), ("while the answer comes", gaps)):
        dropped = sum(round(gap / usual) - 1 for gap in seen if gap > 1.5 * usual)
        console.print(
            f"frames, {name}: {len(seen)}, usual gap {statistics.median(seen):.1f} ms, longest {max(seen):.1f} ms; "
            f"dropped: {dropped}"
        )
    console.print(f"the answer, as the page counts it: {page.locator('.stats').inner_text()}")


def _frames(page: Page, work: Any) -> list[float]:
    """Milliseconds between the frames that are drawn meanwhile."""
    page.evaluate(RECORD_FRAMES)
    work()
    times = page.evaluate("() => window.frames")
    return [after - before for before, after in pairwise(times)]


@contextmanager
def _server() -> Iterator[str]:
    """The URL of a server in a process of its own."""
    words = [sys.executable, "-m", "benchmarks.page", "--serve"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            yield process.stdout.readline().split()[-1]
        finally:
            process.kill()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="in seconds")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
