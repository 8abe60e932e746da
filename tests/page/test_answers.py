"""The page in front of three real nodes: pictures, films and schemas give the API's answers, also over a lost node."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import openai
import pytest
from testing.processes import ENVIRONMENT, node_processes, serving

from mdi.cli.sample_questions import SAMPLES

pytest.importorskip("playwright")
if TYPE_CHECKING:
    from playwright.sync_api import Browser
    from testing.browser import Tab

pytestmark = pytest.mark.slow

PICTURE, FILM = SAMPLES / "position-1-1.png", SAMPLES / "motion-1.mp4"
NUMBERS = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "minItems": 300, "maxItems": 300}
"""A schema of long answers."""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    options = ("--n-nodes", "3", "--dtype", "float32", "--sequence-length", "4096")
    with serving("bundled", *options, environment=ENVIRONMENT) as (_, url):
        yield url


@pytest.fixture
def opened(browser: Browser, url: str) -> Iterator[Tab]:
    from testing.browser import tab

    with tab(browser, url) as opened:
        opened.page.add_init_script("localStorage['mdi-settings'] ??= JSON.stringify({ temperature: '0' })")
        yield opened.open()


def asked(url: str, content: Any, **settings: Any) -> str:
    """The answer over the API."""
    messages: Any = [{"role": "user", "content": content}]
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        answer = client.chat.completions.create(model="bundled", messages=messages, temperature=0, **settings)
    return str(answer.choices[0].message.content)


def with_media(kind: str, path: Path, question: str) -> Any:
    mime = "image/png" if kind == "image" else "video/mp4"
    url = {"url": f"data:{mime};base64,{base64.b64encode(path.read_bytes()).decode()}"}
    return [{"type": f"{kind}_url", f"{kind}_url": url}, {"type": "text", "text": question}]


@pytest.mark.parametrize("way", ["drop", "paste"])
def test_pictures_by_drop_and_by_paste(opened: Tab, url: str, way: str) -> None:
    question = "Describe the image in one sentence."
    if way == "drop":
        opened.drop(PICTURE)
    else:
        opened.paste(PICTURE)
    opened.page.locator(".composer .media img").wait_for()
    opened.ask(question)
    assert opened.answer() == asked(url, with_media("image", PICTURE, question))
    opened.ask("How many shapes are there?")
    assert opened.answer()


def test_a_film(opened: Tab, url: str) -> None:
    question = "Which way does the cross go?"
    opened.page.locator("input[type=file]").set_input_files(FILM)
    opened.page.locator(".composer .media video").wait_for()
    opened.ask(question)
    assert opened.answer() == asked(url, with_media("video", FILM, question))


def test_a_film_that_is_none_is_told_and_the_question_stays(opened: Tab, tmp_path: Path) -> None:
    (tmp_path / "film.mp4").write_bytes(FILM.read_bytes()[:2000])
    opened.drop(tmp_path / "film.mp4")
    opened.page.locator(".composer .media video").wait_for()
    opened.ask("What moves?")
    opened.page.get_by_role("alert").wait_for()
    assert "video" in opened.page.get_by_role("alert").inner_text()
    assert opened.page.get_by_text("What moves?").first.is_visible()


def test_a_stream_survives_a_killed_node_and_the_page_says_what_happened(opened: Tab, url: str) -> None:
    page = opened.page
    undisturbed = asked(
        url,
        "Count.",
        response_format={"type": "json_schema", "json_schema": {"name": "answer", "schema": NUMBERS}},
    )
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("JSON schema of answers").fill(json.dumps(NUMBERS))
    page.get_by_role("button", name="Close").click()
    opened.ask("Count.")
    page.locator(".message.model .markdown", has_text=undisturbed[:40]).wait_for()
    killed = node_processes()[-1]
    killed.kill()
    page.get_by_text("A machine was lost. It is being brought back").wait_for()
    page.locator(".node.bad .state", has_text="lost").wait_for()
    page.get_by_text("All machines are back: answers go on.").wait_for(timeout=60_000)
    assert page.locator(".events", has_text="was lost").is_visible()
    assert json.loads(opened.answer()) == json.loads(undisturbed)
    assert page.locator(".node.bad").count() == 0
