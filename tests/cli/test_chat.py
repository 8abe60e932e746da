"""`mdi chat`: turns that build on each other, what is wrong with a line, and a terminal with Ctrl-C."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from testing.fakes import piece
from testing.processes import command
from testing.terminal import terminal

from mdi import SamplingParams
from mdi.checkpoint.bundled import SHIPPED
from mdi.cli import app as cli
from mdi.cli.chat import Talk
from mdi.core.outputs import Piece

PICTURE = SHIPPED.parent / "samples" / "json-1-1.png"  # a brown circle, a brown heart and a gray star
READY = "\x1b[?2004h"  # what prompt_toolkit turns on when it begins to read: pasting in brackets
ANSWERS = "\x1b[?2004l"  # what it turns off when it has read
Type = Callable[..., str]


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Type:
    """Types lines into a conversation, and returns what was printed, errors last."""
    monkeypatch.chdir(tmp_path)

    def talk(*lines: str, options: tuple[str, ...] = (), code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["mdi", "chat", str(SHIPPED), "--temperature", "0", *options])
        typed = "".join(f"{line}\n" for line in lines).encode(errors="surrogateescape")
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed)))
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == code
        printed = capfd.readouterr()
        return printed.out + printed.err

    return talk


def test_turns_build_on_each_other_and_are_saved(talk: Type, tmp_path: Path) -> None:
    said = talk(f"/image '{PICTURE}'", "How many hearts are there?", "", "What color is the star?", "/save talk.json")
    assert said.splitlines()[:2] == ["1", "gray"]
    asked, answered, again, _ = json.loads((tmp_path / "talk.json").read_text())
    assert asked["content"][0] == {"type": "image", "image": str(PICTURE)}
    assert (answered, again["content"]) == ({"role": "assistant", "content": "1"}, "What color is the star?")


def test_a_new_conversation_has_no_picture(talk: Type) -> None:
    said = talk("/new", "What color is the star?", "/exit", "never asked", options=("--image", str(PICTURE)))
    assert said.splitlines()[0] == "I see no image."
    assert len(said.splitlines()) == 1


def test_what_is_wrong_with_a_line_is_said_and_the_next_one_is_answered(talk: Type, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "there.json").write_text("kept")
    said = talk(
        "/image no.png", "/image ~nobody-of-this-name/cat.png", f"/image {'x' * 300}", "/save ~nobody-of-this-name/a",
        "/save a\0b", "/image", "/image 'cat", "/nothing", "/save there.json", "/image broken.png", "What is it?",
        "x " * 9000, f"/image {PICTURE}", "Describe this picture.",
    )  # fmt: skip
    for cause in (
        "there is no file 'no.png'",
        "there is no file '~nobody-of-this-name/cat.png'",
        "there is no file 'xxx",
        "'~nobody-of-this-name/a' cannot be written (No such file or directory)",
        "cannot be written (embedded null byte)",
        "/image takes one file",
        "cannot be read: No closing quotation",
        "there is no /nothing: /help lists",
        "'there.json' cannot be written (File exists)",
        "this is not an image in a known format",
        "sequence length",
    ):
        assert cause in said, cause
    assert "A brown circle, a brown heart and a gray star." in said
    assert (tmp_path / "there.json").read_text() == "kept"


def test_what_is_not_utf_8_ends_the_conversation_and_lines_before_it_are_answered(talk: Type) -> None:
    said = talk("What color is the star?", "caf\udce9", "never asked", options=("--image", str(PICTURE)), code=2)
    assert said.splitlines()[0] == "gray"
    assert "line 2 of standard input is not UTF-8: convert it" in " ".join(said.split())


def test_ctrl_c_stops_an_answer_and_what_came_of_it_stays(capfd: pytest.CaptureFixture[str]) -> None:
    seen, closed = [], []

    class Stopped:
        def stream(self, messages: list[Any], params: SamplingParams) -> Iterator[Piece]:
            seen.append(messages)
            try:
                yield piece("half")
                raise KeyboardInterrupt
            finally:
                closed.append(True)

    talk = Talk(cast("Any", Stopped()), SamplingParams(), system="Be brief.")
    talk.take("What?")
    talk.take("And?")
    assert capfd.readouterr().out.count("half (stopped)") == 2
    assert closed == [True, True]
    assert [message["content"] for message in seen[1]] == ["Be brief.", "What?", "half", "And?"]


def test_in_a_terminal_there_are_a_history_and_ctrl_d(tmp_path: Path) -> None:
    words = command("chat", SHIPPED, "--n-nodes", "2", "--temperature", "0")
    with terminal(words, tmp_path, XDG_STATE_HOME=str(tmp_path)) as shown:
        shown.read_until(READY)
        shown.type("/help\r")
        assert "/video" in shown.read_until("Ctrl-C stops an answer")
        shown.read_until(READY)
        shown.type("What\x03")  # empties the line
        shown.read_until(READY)
        shown.type("Hello\r")
        shown.read_until("image and ask about it.")
        shown.read_until(READY)
        shown.type("\x04")
        assert shown.process.wait(30) == 0
    history = tmp_path / "mdi" / "chat-history"
    assert "+Hello" in history.read_text()
    assert history.stat().st_mode & 0o077 == 0


def test_in_a_terminal_it_answers_about_an_image_and_saves_that(tmp_path: Path) -> None:
    words = command("chat", SHIPPED, "--image", PICTURE, "--temperature", "0")
    with terminal(words, tmp_path, XDG_STATE_HOME=str(tmp_path)) as shown:
        shown.read_until(READY)
        shown.type("What color is the star?\r")
        shown.read_until("gray")
        shown.read_until(READY)
        shown.type("/save talk.json\r")
        shown.read_until("saved 2 messages to talk.json")
        shown.read_until(READY)
        shown.type("/exit\r")
        assert shown.process.wait(30) == 0
    asked, answered = json.loads((tmp_path / "talk.json").read_text())
    assert asked["content"] == [
        {"type": "image", "image": str(PICTURE)},
        {"type": "text", "text": "What color is the star?"},
    ]
    assert answered == {"role": "assistant", "content": "gray"}


def test_in_a_terminal_ctrl_c_stops_an_answer(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """A model of random weights, whose answers are long."""
    words = command("chat", tiny_checkpoint, "--image", PICTURE, "--max-tokens", "100000", "--temperature", "0")
    with terminal([*words, "--n-nodes", "2"], tmp_path, XDG_STATE_HOME=str(tmp_path)) as shown:
        for question in ("Describe it.", "And now?"):
            shown.read_until(READY)
            shown.type(f"{question}\r")
            shown.read_until(ANSWERS)
            assert shown.read_some()
            shown.type("\x03")
            shown.read_until(" (stopped)")
        shown.read_until(READY)
        shown.type("/save talk.json\r")
        shown.read_until("saved 4 messages")
        shown.read_until(READY)
        shown.type("\x04")
        assert shown.process.wait(30) == 0
    _, first, _, second = json.loads((tmp_path / "talk.json").read_text())
    assert first["content"]
    assert second["content"]
