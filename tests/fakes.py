"""Doubles for the seams between rooms. They compute nothing: tests say what they answer."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from mdi.engine import FinishReason, Piece, Stream
from mdi.engine.prompt import Message
from mdi.errors import MDIError
from mdi.params import SamplingParams

Prompt = str | Sequence[Message]


class Hold:
    """A step of a script that waits for `FakeRequest.resume`."""


HOLD: Final = Hold()
Step = Piece | MDIError | Hold
Script = Callable[[Prompt, SamplingParams], Iterable[Step]]


def piece(text: str, finish: FinishReason | None = None, *, index: int = 0) -> Piece:
    """A piece of one token."""
    return Piece(index, text, (1,), (0.0,), finish)


def echo(prompt: Prompt, params: SamplingParams) -> Iterable[Step]:
    """Every sample says the prompt, in two pieces; the samples take turns."""
    text = prompt if isinstance(prompt, str) else "ok"
    yield from (piece(text, index=index) for index in range(params.n))
    yield from (piece(f" #{index}", "stop", index=index) for index in range(params.n))


class FakeRequest:
    """A scripted request: plays its steps into a real `Stream` and records whether it was cancelled before its end."""

    def __init__(self, steps: Iterable[Step]) -> None:
        self.stream = Stream(self._cancel)
        self.stream.prompt_tokens = 7
        self.cancelled = threading.Event()
        self._steps = deque(steps)
        self._lock = threading.RLock()
        self._ended = False
        self.resume()

    def resume(self) -> None:
        """Plays on to the next HOLD, error, or end. From any thread."""
        with self._lock:
            while self._steps and not self._ended:
                step = self._steps.popleft()
                if isinstance(step, Hold):
                    return
                self._ended = isinstance(step, MDIError)
                self.stream.put(step)
            self._end()

    def _cancel(self) -> None:
        with self._lock:
            if not self._ended:
                self.cancelled.set()
                self._end()

    def _end(self) -> None:
        if not self._ended:
            self._ended = True
            self.stream.put(None)


@dataclass(frozen=True)
class Call:
    """What `submit` was given."""

    prompt: Prompt
    params: SamplingParams
    min_pixels: int | None
    max_pixels: int | None


class FakeEngine:
    """An engine for the gateway: `script` says what requests answer, `refuse` what `submit` raises instead."""

    def __init__(self) -> None:
        self.model_name = "fake"
        self.reset()

    def reset(self) -> None:
        """As new: echoes, refuses nothing, remembers nothing."""
        self.error: MDIError | None = None
        self.script: Script = echo
        self.refuse: Callable[[Prompt], Exception | None] = lambda _: None
        self.calls: list[Call] = []
        self.requests: list[FakeRequest] = []
        self.submitted = threading.Event()

    def says(self, *steps: Step) -> None:
        """Every request plays these steps."""
        self.script = lambda _prompt, _params: steps

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> Stream:
        params = params or SamplingParams()
        if error := self.refuse(prompt):
            raise error
        self.calls.append(Call(prompt, params, min_pixels, max_pixels))
        request = FakeRequest(self.script(prompt, params))
        self.requests.append(request)
        self.submitted.set()
        return request.stream

    def part(self, number: int) -> Any:
        """A content part of the last call's last message."""
        return self.calls[-1].prompt[-1]["content"][number]  # type: ignore[index]
