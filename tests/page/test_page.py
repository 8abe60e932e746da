"""The page in Chromium, in front of a scripted engine: what it shows, keeps, sends and refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image
from testing.fakes import HOLD, FakeEngine, piece
from testing.links import free_port

from mdi.core.config import GatewayConfig
from mdi.core.errors import LinkError
from mdi.core.group import Rank
from mdi.core.status import RecoveryStatus
from mdi.media import MediaPolicy
from mdi.media.fetch import fetch
from tests.gateway.conftest import REAL_KEY, FakeServer, serving

pytest.importorskip("playwright")
from playwright.sync_api import expect

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Dialog
    from testing.browser import Tab

pytestmark = pytest.mark.slow

SAFE_LINK = "noopener noreferrer"
UNSAFE = """Look: <script>fetch("http://evil.test/1")</script><img src="http://evil.test/2" onerror="alert(1)">
![picture](http://evil.test/3) [bad](javascript:alert(2)) [good](https://example.org/) <style>body{display:none}</style>

```html
<b onclick="alert(3)">code</b>
```

| a | b |
|---|---|
| 1 | **2** |
"""


@pytest.fixture
def opened(browser: Browser, server: FakeServer) -> Iterator[Tab]:
    from testing.browser import tab

    with tab(browser, server.url) as opened:
        yield opened.open()


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    Image.fromarray(np.full((60, 80, 3), (200, 30, 60), np.uint8)).save(path)
    return path


def sent(server: FakeServer) -> Any:
    """The messages of the last request."""
    return server.engine.calls[-1].prompt


def test_an_answer_is_shown_as_it_comes(opened: Tab, server: FakeServer) -> None:
    server.engine.says(piece("One "), HOLD, piece("**two**", "stop"))
    opened.ask("Count.")
    answer = opened.page.locator(".message.model")
    answer.get_by_text("One").wait_for()
    assert opened.page.get_by_role("button", name="Stop").is_visible()
    server.engine.requests[-1].resume()
    assert opened.answer() == "One two"
    assert answer.locator("strong").inner_text() == "two"
    assert "7 + 2 tokens" in answer.locator(".stats").inner_text()


def test_unsafe_markdown_does_nothing(opened: Tab, server: FakeServer) -> None:
    dialogs: list[str] = []

    def shown_dialog(dialog: Dialog) -> None:
        dialogs.append(dialog.message)
        dialog.dismiss()

    opened.page.on("dialog", shown_dialog)
    server.engine.says(piece(UNSAFE, "stop"))
    opened.ask("Show me.")
    shown = opened.answer()
    answer = opened.page.locator(".message.model")
    assert "<script>fetch(" in opened.page.locator(".markdown").inner_text()  # as text
    assert answer.locator("script, style, img, [onerror], [onclick]").count() == 0
    links = answer.locator("a").evaluate_all("links => links.map((link) => [link.href, link.rel])")
    assert [link for link in links if "evil" not in link[0]] == [["", SAFE_LINK], ["https://example.org/", SAFE_LINK]]
    assert '<b onclick="alert(3)">code</b>' in shown
    assert answer.locator("td strong").inner_text() == "2"
    assert dialogs == []


def test_markdown_that_grows_is_what_it_is_as_a_whole(opened: Tab, server: FakeServer) -> None:
    """Lists behind blank lines, code, tables, quotes, references that are defined later."""
    text = (
        "1. one\n\n2. two\n\n   more of two\n\n- a\n\n- b\n\n```python\nx = 1\n\ny = 2\n```\n\n> quote\n> goes on\n\n"
        "Title\n=====\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n[late]\n\n"
        + "word " * 30
        + "\n\n[late]: https://example.org/\n"
    )
    grown = [piece(text[at : at + 3]) for at in range(0, len(text), 3)]
    server.engine.says(*(step for each in grown for step in (each, HOLD)), piece("", "stop"))
    opened.ask("Write.")
    shown = opened.page.locator(".message.model .markdown")
    for _ in grown:
        opened.page.wait_for_timeout(20)  # a frame
        server.engine.requests[-1].resume()
    opened.answer_ended()
    by_steps = shown.inner_html()
    server.engine.says(piece(text, "stop"))
    opened.ask("Write.")
    opened.answer_ended()
    assert shown.last.inner_html() == by_steps
    assert shown.last.locator("ol > li").count() == 2
    assert shown.last.locator("a[href='https://example.org/']").count() == 1


def test_stop_leaves_what_has_come_and_go_on_adds_to_it(opened: Tab, server: FakeServer) -> None:
    server.engine.says(piece("The begin"), HOLD, piece("ning", "stop"))
    opened.ask("Tell me.")
    opened.page.get_by_text("The begin").wait_for()
    opened.page.get_by_role("button", name="Stop").click()
    opened.page.get_by_text("Stopped.").wait_for()
    assert server.engine.requests[-1].cancelled.wait(5)
    server.engine.says(piece("ning", "stop"))
    opened.page.get_by_role("button", name="Go on").click()
    opened.page.get_by_text("The beginning").wait_for()
    assert [message.role for message in sent(server)] == ["user", "assistant"]
    assert server.engine.calls[-1].conversation.continue_final_message  # type: ignore[union-attr]


def test_escape_stops_and_the_keyboard_alone_is_enough(opened: Tab, server: FakeServer) -> None:
    server.engine.says(piece("Going on"), HOLD, piece("", "stop"))
    keyboard = opened.page.keyboard
    keyboard.type("Hello")
    keyboard.press("Shift+Enter")
    keyboard.type("there")
    keyboard.press("Enter")
    opened.page.get_by_text("Going on").wait_for()
    assert sent(server)[0].content == "Hello\nthere"
    keyboard.press("Escape")
    opened.page.get_by_text("Stopped.").wait_for()


def test_another_answer_and_an_edited_question(opened: Tab, server: FakeServer) -> None:
    for answer in ("first", "second"):
        server.engine.says(piece(answer, "stop"))
        opened.ask(f"Question {answer}") if answer == "first" else opened.page.get_by_role(
            "button", name="Another answer"
        ).click()
        opened.page.locator(".message.model", has_text=answer).wait_for()
        assert len(sent(server)) == 1
    opened.ask("More")
    opened.answer()
    assert len(sent(server)) == 3
    opened.page.get_by_role("button", name="Edit").first.click()
    opened.page.get_by_role("textbox", name="Edited message").fill("Changed")
    opened.page.get_by_role("button", name="Send again").click()
    opened.answer()
    assert [message.content for message in sent(server)] == ["Changed"]
    assert opened.page.locator(".message").count() == 2


def test_settings_are_sent_and_kept(opened: Tab, server: FakeServer) -> None:
    page = opened.page
    page.get_by_role("button", name="Settings").click()
    for label, value in (("Temperature", "0.5"), ("Top p", "0.9"), ("Top k", "7"), ("Seed", "3")):
        page.get_by_label(label).fill(value)
    page.get_by_label("Most tokens of an answer").fill("11")
    page.get_by_label("System message").fill("Be short.")
    page.get_by_role("button", name="Close").click()
    page.reload()
    opened.ask("Hello")
    opened.answer()
    params = server.engine.calls[-1].params
    assert (params.temperature, params.top_p, params.top_k, params.seed, params.max_tokens) == (0.5, 0.9, 7, 3, 11)
    assert [(message.role, message.content) for message in sent(server)] == [("system", "Be short."), ("user", "Hello")]


def test_a_schema_binds_answers_and_a_wrong_one_is_told(opened: Tab, server: FakeServer) -> None:
    page = opened.page
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("JSON schema of answers").fill('{"type": "object"')
    page.get_by_text("The schema of answers in the settings is no JSON").wait_for()
    page.get_by_role("button", name="Close").click()
    opened.ask("Hello")
    page.get_by_role("alert").get_by_text("is no JSON").wait_for()
    assert server.engine.calls == []
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("JSON schema of answers").fill('{"type": "object"}')
    page.get_by_role("button", name="Close").click()
    server.engine.says(piece('{"colour": "red"}', "stop"))
    page.get_by_role("button", name="Try again").click()
    assert json.loads(opened.answer()) == {"colour": "red"}
    assert server.engine.calls[-1].constraint is not None


def test_calls_of_tools_are_shown_and_their_results_returned(opened: Tab, server: FakeServer) -> None:
    page = opened.page
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Tools").fill('[{"type": "function", "function": {"name": "weather", "parameters": {}}}]')
    page.get_by_role("button", name="Close").click()
    server.engine.says(piece('<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>', "stop"))
    opened.ask("How is the weather in Rome?")
    opened.answer_ended()
    call = page.get_by_role("region", name="Call of weather")
    assert json.loads(call.locator("pre").inner_text()) == {"city": "Rome"}
    give = page.get_by_role("button", name="Give the results")
    assert give.is_disabled()
    call.get_by_label("Its result").fill("sunny")
    server.engine.says(piece("It is sunny.", "stop"))
    give.click()
    assert opened.answer() == "It is sunny."
    assert [message.role for message in sent(server)] == ["user", "assistant", "tool"]
    assert sent(server)[2].content == "sunny"


def test_conversations_stay_in_the_browser(opened: Tab, server: FakeServer, picture: Path) -> None:
    page = opened.page
    opened.drop(picture)
    page.get_by_alt_text("picture.png").wait_for()
    opened.ask("What is it?")
    opened.answer()
    page.get_by_role("button", name="New conversation").click()
    opened.ask("Another one")
    opened.answer()
    page.get_by_role("textbox", name="Message", exact=True).fill("not sent yet")
    page.wait_for_timeout(700)
    page.reload()
    expect(page.get_by_role("textbox", name="Message", exact=True)).to_have_value("not sent yet")
    page.get_by_role("button", name="What is it?", exact=True).click()
    shown = page.get_by_alt_text("picture.png")
    shown.wait_for()
    assert shown.evaluate("image => image.decode().then(() => image.naturalWidth)") == 80
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete What is it?").click()
    page.get_by_text("What is it?").first.wait_for(state="detached")
    page.reload()
    page.get_by_role("button", name="Another one", exact=True).wait_for()
    assert page.get_by_text("What is it?").count() == 0


def test_files_that_are_no_media_are_told_and_nothing_typed_is_lost(opened: Tab, tmp_path: Path, picture: Path) -> None:
    page = opened.page
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "broken.png").write_bytes(picture.read_bytes()[:60])
    (tmp_path / "empty.png").write_bytes(b"")
    page.get_by_role("textbox", name="Message", exact=True).fill("typed")
    opened.drop(*(tmp_path / name for name in ("notes.txt", "broken.png", "picture.png", "empty.png")))
    page.get_by_text("notes.txt is neither an image nor a video (text/plain)").wait_for()
    page.get_by_text("broken.png cannot be read as an image").wait_for()
    page.get_by_text("empty.png is empty").wait_for()
    assert page.locator(".composer .media li").count() == 1
    assert page.get_by_role("textbox", name="Message", exact=True).input_value() == "typed"
    page.get_by_role("button", name="Remove picture.png").click()
    page.locator(".composer .media li").wait_for(state="detached")


def test_pictures_come_from_the_camera_too(opened: Tab, server: FakeServer) -> None:
    page = opened.page
    page.get_by_role("button", name="Camera").click()
    page.locator("video.camera").evaluate(
        "video => video.videoWidth || new Promise((seen) => video.addEventListener('loadeddata', () => seen(0)))"
    )
    page.get_by_role("button", name="Take the image").click()
    page.get_by_alt_text("camera.jpg").wait_for()
    opened.ask("What do you see?")
    opened.answer()
    image = server.engine.part(0)
    assert fetch(image.source, MediaPolicy())[:2] == b"\xff\xd8"


def test_a_model_that_reads_text_takes_no_pictures(browser: Browser, picture: Path) -> None:
    from testing.browser import tab

    engine = FakeEngine()
    engine.capabilities = replace(engine.capabilities, modalities=("text",))
    with serving(engine) as server, tab(browser, server.url) as opened:
        opened.open()
        opened.page.get_by_text("Reads text, up to 512 tokens").wait_for()
        opened.drop(picture)
        opened.page.get_by_text("fake reads no images: picture.png was not taken").wait_for()
        assert opened.page.get_by_role("button", name="Image or video").count() == 0


def test_a_key_is_asked_for_and_a_wrong_one_again(browser: Browser) -> None:
    from testing.browser import tab

    with serving(FakeEngine(), GatewayConfig(api_keys=(REAL_KEY,))) as server, tab(browser, server.url) as opened:
        page = opened.page
        page.goto(server.url)
        dialog = page.get_by_role("dialog", name="This server needs a key")
        assert opened.violations() == ""
        dialog.get_by_label("API key").fill("wrong")
        dialog.get_by_role("button", name="Use this key").click()
        dialog.get_by_text("The server refused the key").wait_for()
        dialog.get_by_label("API key").fill(REAL_KEY)
        dialog.get_by_label("Keep it in this browser").check()
        dialog.get_by_role("button", name="Use this key").click()
        page.get_by_role("heading", name="fake").first.wait_for()
        opened.ask("Hello")
        assert opened.answer() == "ok #0"
        page.reload()
        page.get_by_role("heading", name="fake").first.wait_for()


def test_a_refused_request_is_told_and_may_be_tried_again(opened: Tab, server: FakeServer) -> None:
    server.engine.refuse = lambda _: LinkError("node finisher broke")
    opened.ask("Hello")
    opened.page.get_by_role("alert").get_by_text("node finisher broke").wait_for()
    server.engine.refuse = lambda _: None
    opened.page.get_by_role("button", name="Try again").click()
    assert opened.answer() == "ok #0"


def test_what_happens_to_the_machines_is_told(opened: Tab, server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    page = opened.page
    page.get_by_text("Why this split: one node has the whole model").wait_for()
    [node] = server.engine.nodes()
    lost = replace(node, state="lost", error="the process ended")
    server.engine.says(piece("Half an ans"), HOLD, piece("wer", "stop"))
    opened.ask("Tell me.")
    page.get_by_text("Half an ans").wait_for()
    monkeypatch.setattr(server.engine, "nodes", lambda: [lost])
    server.engine.recovery = RecoveryStatus(recovering=True, recoveries=1, failed_requests=0)
    page.get_by_text("A machine was lost. It is being brought back, and the answer goes on").wait_for()
    page.get_by_text("starter was lost: the process ended. Answers wait.").wait_for()
    assert page.locator("aside .strip .part.bad").is_visible()
    assert opened.violations() == ""
    monkeypatch.undo()
    server.engine.recovery = RecoveryStatus(recovering=False, recoveries=1, failed_requests=0)
    page.get_by_text("All machines are back: answers go on.").wait_for()
    server.engine.requests[-1].resume()
    assert opened.answer() == "Half an answer"


def test_nodes_that_share_a_stage_are_shown_in_its_place(
    opened: Tab, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    [node] = server.engine.nodes()
    stage = [
        replace(node, name=name, rank=rank, shards=Rank(first, last, 4))
        for rank, (name, first, last) in enumerate([("starter", 0, 3), ("secondary0", 3, 4)])
    ]
    finisher = replace(node, name="finisher", first_layer=2, last_layer=4, group=1, rank=0)
    monkeypatch.setattr(server.engine, "nodes", lambda: [*stage, finisher])
    page = opened.page
    page.get_by_text("rank 1 of 2, 25 %").wait_for()
    shown = page.locator("aside .strip .stage")
    assert [one.locator(".part").all_inner_texts() for one in shown.all()] == [["0–1 · 75 %", "0–1 · 25 %"], ["2–3"]]
    left, right = (one.bounding_box() for one in shown.all())
    assert left
    assert right
    assert (left["width"], left["height"]) == pytest.approx((right["width"], right["height"]), abs=1)
    assert opened.violations() == ""


def test_a_server_that_goes_and_comes_back_loses_nothing(browser: Browser) -> None:
    from testing.browser import tab

    port = free_port()

    def start() -> Any:
        return serving(FakeEngine(), port=port)

    with tab(browser, f"http://127.0.0.1:{port}") as opened:
        page = opened.page
        with start() as server:
            opened.open()
            server.engine.says(piece("Half an ans"), HOLD, piece("", "stop"))
            opened.ask("Tell me.")
            page.get_by_text("Half an ans").wait_for()
            page.get_by_role("textbox", name="Message", exact=True).fill("typed meanwhile")
            for connection in list(server.http.server_state.connections):
                connection.transport.abort()
        page.get_by_text("The server does not answer. What you type is kept").wait_for()
        page.get_by_text("The connection broke before the end of the answer.").wait_for()
        with start() as server:
            page.get_by_text("The server answers again.").wait_for()
            server.engine.says(piece("wer", "stop"))
            page.get_by_role("button", name="Go on").click()
            page.get_by_text("Half an answer").wait_for()
            assert page.get_by_role("textbox", name="Message", exact=True).input_value() == "typed meanwhile"
        opened.errors.clear()  # connections that were refused


@pytest.mark.parametrize("look", ["light", "dark", "phone"])
def test_axe_finds_nothing_to_complain_of(browser: Browser, server: FakeServer, picture: Path, look: str) -> None:
    from testing.browser import DESKTOP, PHONE, tab

    settings: dict[str, Any] = {"viewport": PHONE if look == "phone" else DESKTOP}
    with tab(browser, server.url, color_scheme="dark" if look == "dark" else "light", **settings) as opened:
        page = opened.open().page
        page.locator(".strip").first.wait_for(state="attached")
        assert opened.violations() == ""
        opened.drop(picture)
        page.get_by_alt_text("picture.png").wait_for()
        server.engine.says(piece(UNSAFE, "stop"))
        opened.ask("What is it?")
        opened.answer()
        assert opened.violations() == ""
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.get_by_role("button", name="Settings").click()
        assert opened.violations() == ""
        page.get_by_role("button", name="Close").click()
        if look == "phone":
            for drawer in ("Conversations", "Machines"):
                page.get_by_role("button", name=drawer, exact=True).click()
                assert opened.violations() == ""
