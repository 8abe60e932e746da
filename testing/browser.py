"""The system's Chromium, driven by Playwright: a page, what it asked for, what went wrong in it, and files for it."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Error, Page, Request, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--no-sandbox",  # the tests may run as root
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
)
DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 780}


def find_chromium() -> str:
    """The path of the system's Chromium. Raises FileNotFoundError when there is none."""
    for name in NAMES:
        if path := shutil.which(name):
            return path
    raise FileNotFoundError(f"the tests of the page need one of {', '.join(NAMES)}: apt-get install chromium")


@contextmanager
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=list(FLAGS))
        yield browser
        browser.close()


@dataclass
class Tab:
    """A tab on a server's page. origins: of all that it asked for. errors: of its scripts, and of broken policies."""

    page: Page
    url: str
    origins: set[str] = field(default_factory=set)
    errors: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.on("request", self._asked)
        self.page.on("console", self._said)
        self.page.on("pageerror", self._failed)

    def open(self) -> Tab:
        self.page.goto(self.url)
        self.page.get_by_role("textbox", name="Message", exact=True).wait_for()
        return self

    def ask(self, text: str) -> None:
        message = self.page.get_by_role("textbox", name="Message", exact=True)
        message.fill(text)
        message.press("Enter")  # there, also where a dialog that closes gives the focus back just now
        self.page.locator(".message.user", has_text=text).last.wait_for()

    def answer(self, timeout_s: float = 60) -> str:
        """The text of the last answer, when it has come to its end."""
        self.answer_ended(timeout_s)
        return self.page.locator(".message.model .markdown, .message.model figure.code pre").last.inner_text()

    def answer_ended(self, timeout_s: float = 60) -> None:
        """Waits until no answer is coming."""
        self.page.get_by_role("button", name="Stop").wait_for(state="detached", timeout=timeout_s * 1000)

    def drop(self, *files: Path) -> None:
        """Drops files on the page, as from the desktop."""
        session = self.page.context.new_cdp_session(self.page)
        data = {"items": [], "files": [str(file) for file in files], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            session.send("Input.dispatchDragEvent", {"type": kind, "x": 200, "y": 300, "data": data})

    def paste(self, picture: Path) -> None:
        """Pastes a PNG from the clipboard, as after a copy from another program."""
        self.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        self.page.evaluate(
            """async (data) => {
                const bytes = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
                const item = new ClipboardItem({ "image/png": new Blob([bytes], { type: "image/png" }) });
                await navigator.clipboard.write([item]);
            }""",
            base64.b64encode(picture.read_bytes()).decode(),
        )
        self.page.get_by_role("textbox", name="Message", exact=True).focus()
        self.page.keyboard.press("Control+V")

    def violations(self) -> str:
        """What axe-core finds to be inaccessible, in words; empty if nothing."""
        found = Axe().run(self.page)
        return found.generate_report() if found.violations_count else ""

    def _asked(self, request: Request) -> None:
        parts = urlsplit(request.url)
        if parts.scheme not in ("blob", "data"):
            self.origins.add(f"{parts.scheme}://{parts.netloc}")

    def _said(self, message: ConsoleMessage) -> None:
        if message.type == "error" and "Failed to load resource" not in message.text:  # of answers with error statuses
            self.errors.append(message.text)

    def _failed(self, error: Error) -> None:
        self.errors.append(str(error))


@contextmanager
def tab(browser: Browser, url: str, **settings: Any) -> Iterator[Tab]:
    """A tab in a profile of its own. At its end, checks that it asked nobody but the server, and had no errors."""
    context: BrowserContext = browser.new_context(viewport=settings.pop("viewport", DESKTOP), **settings)
    context.set_default_timeout(20_000)
    try:
        opened = Tab(context.new_page(), url)
        yield opened
        assert opened.origins <= {url}, opened.origins
        assert opened.errors == []
    finally:
        context.close()
