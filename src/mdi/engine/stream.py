"""The caller's end of a running request: an iterator over pieces, for threads and for asyncio."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator, Callable, Iterator

from mdi.core.errors import MDIError
from mdi.core.outputs import Completion, Piece, Usage, collect


class Stream:
    """Pieces of one request, in order. Iterate it (`for` or `async for`) once, from one place.

    Iteration raises the error that ended the request early: InputError for media or lengths that do not fit, LinkError
    for a lost node, ClosedError at shutdown. A cancelled stream ends without an error.

    prompt_token_ids: of the prompt, media included; none before the first piece. opens_thought: whether the prompt ends
    with the mark that begins thoughts.
    """

    def __init__(self, cancel: Callable[[], None]) -> None:
        self.prompt_token_ids: tuple[int, ...] = ()
        self.opens_thought = False
        self.completion_tokens = 0
        self.cached_tokens = 0
        self._cancel = cancel
        self._items: queue.SimpleQueue[Piece | MDIError | None] = queue.SimpleQueue()
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
        piece = self._taken(self._items.get())
        if piece is None:
            raise StopIteration
        return piece

    def __aiter__(self) -> AsyncIterator[Piece]:
        return self

    async def __anext__(self) -> Piece:
        if self._ended:
            raise StopAsyncIteration
        piece = self._taken(await self._next_item())
        if piece is None:
            raise StopAsyncIteration
        return piece

    async def _next_item(self) -> Piece | MDIError | None:
        loop, arrived = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            loop.call_soon_threadsafe(arrived.set)

        self._wake = wake
        try:
            while True:
                try:
                    return self._items.get_nowait()
                except queue.Empty:
                    await arrived.wait()
                    arrived.clear()
        finally:
            self._wake = None

    def _taken(self, item: Piece | MDIError | None) -> Piece | None:
        self._ended = not isinstance(item, Piece)
        if isinstance(item, MDIError):
            raise item
        return item
