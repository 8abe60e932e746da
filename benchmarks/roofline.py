"""What this machine can do, measured in the run that it is compared with. A side for `benchmarks.sides`."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable

from benchmarks.serve_side import serve
from mdi.kernels.library import library

READ_BYTES = 2**30
STEPS = 2_000_000
TRIES = 3


class Roofline:
    """Rates of all threads together: the kernels' library reads a gibibyte in huge pages, and computes in registers."""

    def __init__(self, threads: int) -> None:
        kernels = library()
        assert kernels is not None, "build the kernels first: python -m mdi.kernels.build"
        kernels.shared("set_threads", ctypes.c_int)(threads)
        self._kernels, self._threads = kernels, threads
        allocate = kernels.shared("allocate", ctypes.c_size_t, result=ctypes.c_void_p)
        self._memory = allocate(READ_BYTES)
        ctypes.memset(self._memory, 1, READ_BYTES)
        self._read = kernels.kernel("limit_read", ctypes.c_void_p, ctypes.c_size_t, result=ctypes.c_int)

    def read_rate(self) -> float:
        """Bytes a second from memory, one stream for each thread, at best."""
        return READ_BYTES / best_s(lambda: self._read(self._memory, READ_BYTES))

    def operation_rate(self, kind: str) -> float:
        """Operations a second on "floats", "bf16" or "int8", at best: a multiplication and a sum are two."""
        compute = self._kernels.kernel(f"limit_{kind}", ctypes.c_long, result=ctypes.c_long)
        operations: int = compute(STEPS) * self._threads
        return operations / best_s(lambda: compute(STEPS))


def best_s(call: Callable[[], object]) -> float:
    seconds = []
    for _ in range(TRIES):
        started_s = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started_s)
    return min(seconds)


if __name__ == "__main__":
    serve(Roofline)
