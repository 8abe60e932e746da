"""How many threads compute in this process. Either our pool has them or torch does: both would wait for each other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_int

import torch

from mdi.core.cores import default_threads
from mdi.kernels.library import library


def set_threads(count: int | None, device: str) -> None:
    """Sets how many threads compute from now on; None is one for each usable core. To be called before they begin.

    On a CPU with kernels, the pool has them and torch has one. On other devices and without kernels, torch has them.
    """
    count = count or default_threads()
    found = library() if device == "cpu" else None
    if found:
        found.shared("set_threads", c_int)(count)
    torch.set_num_threads(1 if found else count)


def compute_threads() -> int:
    """How many threads compute on CPUs in this process."""
    found = library()
    return found.shared("threads", result=c_int)() if found else torch.get_num_threads()


def computes_with(device: str = "cpu") -> str:
    """What computes on a device in this process, in words: "avx2 kernels, 2 threads", "torch 2.13.0 on cuda:0"."""
    if not device.startswith("cpu"):
        return f"torch {torch.__version__} on {device}"
    found, count = library(), compute_threads()
    kernels = f"{found.isa} kernels" if found else f"torch {torch.__version__}"
    return f"{kernels}, {count} thread{'s' if count > 1 else ''}"


@contextmanager
def torch_threads() -> Iterator[None]:
    """Gives torch all usable cores while none of our kernels compute: for models of others in this process."""
    before = torch.get_num_threads()
    torch.set_num_threads(default_threads())
    try:
        yield
    finally:
        torch.set_num_threads(before)
