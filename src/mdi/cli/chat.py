"""`mdi chat`: a conversation about images and videos in the terminal."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from mdi.cli.options import EngineOptions, Images, LimitOptions, Model, Videos, grouped
from mdi.cli.screen import err, out, say
from mdi.core.errors import InputError

if TYPE_CHECKING:
    from mdi.core.sampling import SamplingParams
    from mdi.engine import Engine

Message = dict[str, Any]

COMMANDS = {
    "/image": "FILE or URL: the next question is about this image, too",
    "/video": "FILE or URL: the same with a video",
    "/new": "forget the conversation",
    "/save": "FILE: write the conversation as JSON, in OpenAI's form",
    "/help": "this list",
    "/exit": "end; so does Ctrl-D. Ctrl-C stops an answer",
}


@grouped
def chat(
    model: Model,
    options: EngineOptions,
    limits: LimitOptions,
    image: Images = None,
    video: Videos = None,
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer, in tokens.")] = 1024,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answers.")] = None,
) -> None:
    """Talk with a model in the terminal, about images and videos; /help lists what can be typed."""
    from mdi.core.sampling import SamplingParams

    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
    with options.start(model, **asdict(limits)) as engine:
        talk = Talk(engine, params, system)
        for kind, places in (("image", image), ("video", video)):
            for place in places or ():
                talk.attach(kind, place)
        if sys.stdin.isatty():
            say(Text(f"{engine.model_name}: /help lists what can be typed", "dim"))
        for line in _lines():
            if line.strip() == "/exit":
                break
            talk.take(line)


class Talk:
    """One conversation, in OpenAI's form, and what is attached to the next question."""

    def __init__(self, engine: Engine, params: SamplingParams, system: str | None) -> None:
        self._engine = engine
        self._params = params
        self._beginning: list[Message] = [{"role": "system", "content": system}] if system else []
        self._messages = list(self._beginning)
        self._attached: list[dict[str, str]] = []

    def take(self, line: str) -> None:
        """A line that was typed. What is wrong with it is said, and the conversation stays as it was."""
        try:
            if line.startswith("/"):
                self._command(line)
            elif line.strip():
                self._ask(line)
        except InputError as error:
            say(Text(f"{error}", "red"), err)

    def attach(self, kind: str, place: str) -> None:
        """Raises InputError where there is no such file."""
        if "://" not in place and not place.startswith("data:"):
            place = os.path.expanduser(place)  # noqa: PTH111 - of pathlib: raises for users that do not exist
            if not os.path.isfile(place):  # noqa: PTH113 - the same for names that are too long
                raise InputError(f"there is no file {place!r}", kind)
        self._attached.append({"type": kind, kind: place})

    def _command(self, line: str) -> None:
        name, *words = _words(line)
        takers: dict[str, Callable[[str], None]] = {
            "/image": lambda place: self.attach("image", place),
            "/video": lambda place: self.attach("video", place),
            "/save": self._save,
        }
        if name in takers:
            if len(words) != 1:
                raise InputError(f"{name} takes one file: {name} cat.jpg, with quotation marks around blanks", name)
            takers[name](words[0])
        elif name == "/new":
            self._messages, self._attached = list(self._beginning), []
        elif name == "/help":
            for command, meaning in COMMANDS.items():
                say(f"{command:8} {meaning}")
        else:
            raise InputError(f"there is no {name}: /help lists what can be typed", name)

    def _ask(self, question: str) -> None:
        """The turn stays in the conversation with what came of its answer, also where Ctrl-C stopped it."""
        content: Any = [*self._attached, {"type": "text", "text": question}] if self._attached else question
        asked = [*self._messages, {"role": "user", "content": content}]
        self._attached = []  # also where this fails: a broken picture would spoil every further question
        text = ""
        pieces = self._engine.stream(asked, self._params)
        try:
            for piece in pieces:
                text += piece.text  # first: Ctrl-C may come right after it is shown
                out.file.write(piece.text)  # as it is: `print` would turn tabs into spaces
                out.file.flush()
            out.print()
        except KeyboardInterrupt:
            say(Text(" (stopped)", "dim"))
        finally:
            pieces.close()  # type: ignore[attr-defined]  # a generator: its request ends
        self._messages = [*asked, {"role": "assistant", "content": text}]

    def _save(self, name: str) -> None:
        try:
            with Path(os.path.expanduser(name)).open("x", encoding="utf-8") as file:  # noqa: PTH111 - as in `attach`
                json.dump(self._messages, file, indent=2, ensure_ascii=False)
        except (OSError, ValueError) as error:  # the second: a name with a zero byte
            reason = error.strerror if isinstance(error, OSError) else error
            raise InputError(f"{name!r} cannot be written ({reason})", "/save") from None
        say(Text(f"saved {len(self._messages)} messages to {name}", "dim"))


def _words(line: str) -> list[str]:
    try:
        return shlex.split(line)
    except ValueError as error:
        raise InputError(f"{line!r} cannot be read: {error}", line) from None


def _lines() -> Iterator[str]:
    """What is typed, with a history and completion; without a terminal, the lines of standard input."""
    if not sys.stdin.isatty():
        yield from _piped_lines(sys.stdin.buffer)
        return
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import NestedCompleter, PathCompleter

    files = PathCompleter(expanduser=True)
    completions = {name: files if "FILE" in meaning else None for name, meaning in COMMANDS.items()}
    session: PromptSession[str] = PromptSession(
        "> ", history=_history(), completer=NestedCompleter.from_nested_dict(completions), complete_while_typing=False
    )
    while True:
        try:
            yield session.prompt()
        except KeyboardInterrupt:  # at the prompt it empties the line
            continue
        except EOFError:
            return


def _piped_lines(lines: Iterable[bytes]) -> Iterator[str]:
    """Raises InputError at a line that is not UTF-8; those before it are answered."""
    for number, line in enumerate(lines, 1):
        try:
            yield line.decode().rstrip("\r\n")
        except UnicodeDecodeError:
            raise InputError(
                f"line {number} of standard input is not UTF-8: convert it, as with iconv -f latin1 -t utf-8", "prompt"
            ) from None


def _history() -> Any:
    """Of earlier conversations too, which only this user may read."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    folder = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "mdi"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "chat-history"
        file.touch(mode=0o600)
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(file))
