"""Writes the pictures of the page in docs/, from a real server of the bundled model on three nodes.

python -m testing.screenshots
"""

from __future__ import annotations

from pathlib import Path

from playwright.sync_api import Browser

from mdi.cli.sample_questions import SAMPLES
from testing.browser import DESKTOP, PHONE, Tab, chromium, tab
from testing.processes import ENVIRONMENT, node_processes, serving

DOCS = Path(__file__).parents[1] / "docs"


def main() -> None:
    options = ("--n-nodes", "3", "--dtype", "float32")
    with serving("bundled", *options, environment=ENVIRONMENT) as (_, url), chromium() as browser:
        _conversation(browser, url, "light", DESKTOP)
        _conversation(browser, url, "dark", DESKTOP)
        _conversation(browser, url, "phone", PHONE)
        _lost_node(browser, url)


def _conversation(browser: Browser, url: str, name: str, viewport: dict[str, int]) -> None:
    scheme = "dark" if name == "dark" else "light"
    with tab(browser, url, viewport=viewport, color_scheme=scheme, device_scale_factor=1.5) as opened:
        opened.open()
        opened.drop(SAMPLES / "describe-1-1.png")
        opened.page.locator(".composer .media img").wait_for()
        opened.ask("Describe the image in one sentence")
        opened.answer_ended()
        opened.ask("How many shapes does the image contain?")
        opened.answer_ended()
        _save(opened, name)


def _lost_node(browser: Browser, url: str) -> None:
    with tab(browser, url, viewport=DESKTOP, device_scale_factor=1.5) as opened:
        opened.open()
        opened.drop(SAMPLES / "position-1-1.png")
        opened.page.locator(".composer .media img").wait_for()
        opened.page.locator(".node").last.wait_for()
        node_processes()[-1].kill()
        opened.page.locator(".node.bad").wait_for()
        opened.ask("Which shape lies right of the text?")
        opened.page.get_by_text("A machine was lost.").wait_for()
        opened.page.screenshot(path=DOCS / "page-recovery.png")


def _save(opened: Tab, name: str) -> None:
    opened.page.wait_for_timeout(1500)  # for figures of the machines
    opened.page.screenshot(path=DOCS / f"page-{name}.png")


if __name__ == "__main__":
    main()
