"""The caller's end of a running request: an iterator over pieces, for threads and for asyncio."""

from __future__ import annotations

import asyncio
import queue
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Literal

from mdi.core.batch import Token
from mdi.core.errors import MDIError
from mdi.core.outputs import Completion, Piece, Timing, Usage, collect, joined
from mdi.engine.wakes import Wakes

MANY = 16  # pieces that wait for a slow caller: more are joined
JOINED_CHARACTERS = 16_384  # about: further ones wait
Step = Literal["prepared_s", "encoded_s", "scheduled_s", "first_token_s", "last_token_s"]
"""Of `Timing`."""


class Stream:
    """Pieces of one request, in order. Iterate it (`for` or `async for`) once, from one place.

    Iteration raises the error that ended the request early: InputError for media or lengths that do not fit, LinkError
    for a lost node, ClosedError at shutdown. A cancelled stream ends without an error.

    prompt_token_ids: of the prompt, media included; none before the first piece. opens_thought: whether the prompt ends
    with the mark that begins thoughts. prompt_logprobs: the prompt's tokens with their logprobs, but the first, which
    has none; only where the request asks for them. timing: so far; complete when the stream has ended.
    """

    def __init__(self, cancel: Callable[[], None]) -> None:
        self.prompt_token_ids: tuple[int, ...] = ()
        self.prompt_logprobs: tuple[Token, ...] = ()
        self.opens_thought = False
        self.completion_tokens = 0
        self.cached_tokens = 0
        self.timing = Timing(time.monotonic())
        self._cancel = cancel
        self._items: queue.SimpleQueue[Piece | MDIError | None] = queue.SimpleQueue()
        self._ready = deque[Piece | MDIError | None]()
        self._wake: Callable[[], None] | None = None
        self._ended = False

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def usage(self) -> Usage:
        """Tokens so far; complete when the stream has ended."""
        return Usage(self.prompt_tokens, self.completion_tokens, self.cached_tokens)

    def cancel(self) -> None:
        """Ends the request within one step of the engine. From any thread, at any time, more than once."""
        self._cancel()

    def completion(self) -> Completion:
        """Waits for the end; all pieces together."""
        return collect(list(self), self.usage)

    def reached(self, step: Step) -> None:
        """Notes the time of a step. For the engine."""
        self.timing = replace(self.timing, **{step: time.monotonic()})

    def put(self, item: Piece | MDIError | None) -> None:
        """Adds a piece, the error that ended the request, or None at its end. For the engine."""
        if isinstance(item, Piece):
            self.completion_tokens += len(item.tokens)
        self._items.put(item)
        if wake := self._wake:
            wake()

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        if self._ended:
            raise StopIteration
        piece = self._taken(self._ready.popleft() if self._ready else self._items.get())
        if piece is None:
            raise StopIteration
        return piece

    def __aiter__(self) -> AsyncIterator[Piece]:
        return self

    async def __anext__(self) -> Piece:
        """The next piece. A caller that is far behind gets what waits for it as one piece a sample."""
        if self._ended:
            raise StopAsyncIteration
        if not self._ready and self._items.empty():
            await self._arrival()
        else:
            await asyncio.sleep(0)  # a caller that is behind lets others run
        if not self._ready:
            self._ready.extend(self._waiting())
        piece = self._taken(self._ready.popleft())
        if piece is None:
            raise StopAsyncIteration
        return piece

    async def _arrival(self) -> None:
        wakes = Wakes.of(asyncio.get_running_loop())
        waiter = wakes.loop.create_future()
        self._wake = partial(wakes.wake, waiter)
        try:
            if self._items.empty():  # otherwise it came before there was anybody to wake
                await waiter
        finally:
            self._wake = None

    def _waiting(self) -> list[Piece | MDIError | None]:
        """What has come, but joined where it is much."""
        items, characters = list[Piece | MDIError | None](), 0
        while characters < JOINED_CHARACTERS and not self._items.empty():
            items.append(item := self._items.get_nowait())
            characters += len(item.text) if isinstance(item, Piece) else 0
        if len(items) <= MANY:
            return items
        by_sample: dict[int, list[Piece]] = {}
        for item in items:
            if isinstance(item, Piece):
                by_sample.setdefault(item.index, []).append(item)
        return [*map(joined, by_sample.values()), *(item for item in items if not isinstance(item, Piece))]

    def _taken(self, item: Piece | MDIError | None) -> Piece | None:
        self._ended = not isinstance(item, Piece)
        if isinstance(item, MDIError):
            raise item
        return item
