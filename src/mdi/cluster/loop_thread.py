"""An asyncio loop in a thread of its own, for callers that know no asyncio."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class LoopThread:
    """Runs from the start until it is closed."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._begun: set[Future[Any]] = set()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def begin(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Starts a coroutine there, from any thread."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        self._begun.add(future)  # asyncio itself may forget what it runs
        future.add_done_callback(self._begun.discard)
        return future

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine there to its end, from any thread but this one."""
        return self.begin(coroutine).result()

    def post(self, callback: Callable[..., object], *arguments: Any) -> None:
        """Calls a function there soon, from any thread."""
        self._loop.call_soon_threadsafe(callback, *arguments)

    def close(self) -> None:
        """Cancels what still runs there and ends its threads. Safe to call twice."""
        if self._thread.is_alive():
            self.call(_end_others())
            self.post(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()


async def _end_others() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.get_running_loop().shutdown_default_executor()
