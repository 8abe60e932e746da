"""The C library's allocator, told to keep a server's memory flat. Does nothing where it is not glibc's."""

from __future__ import annotations

import ctypes
import sys

M_ARENA_MAX = -8  # malloc.h
MAX_ARENAS = 2


def limit_arenas() -> None:
    """Lets all threads share a few heaps, for as long as the process runs. To be called before there are threads.

    glibc gives up to eight heaps a core to threads, and each keeps the memory of the largest image it ever had.
    """
    library = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    if library and hasattr(library, "mallopt"):
        library.mallopt(M_ARENA_MAX, MAX_ARENAS)
