"""The C library's allocator, told to keep a server's memory flat. Does nothing where it is not glibc's."""

from __future__ import annotations

import ctypes
import functools
import queue
import sys
from typing import TypeVar

M_ARENA_MAX = -8  # malloc.h
MAX_ARENAS = 2
IDLE_S = 1.0

T = TypeVar("T")


def limit_arenas() -> None:
    """Lets all threads share a few heaps, for as long as the process runs. To be called before there are threads.

    glibc gives up to eight heaps a core to threads, and each keeps the memory of the largest image it ever had.
    """
    if library := _glibc():
        library.mallopt(M_ARENA_MAX, MAX_ARENAS)


def next_item(items: queue.SimpleQueue[T]) -> T:
    """Waits for the next item of a queue. When none comes for `IDLE_S`, gives free memory back to the system.

    Loading a chunk and a prompt of 500 tokens leave some 20 MB each, which glibc would keep for the next ones.
    """
    try:
        return items.get(timeout=IDLE_S)
    except queue.Empty:
        if library := _glibc():
            library.malloc_trim(0)
        return items.get()


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    library = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    return library if library and hasattr(library, "mallopt") else None
