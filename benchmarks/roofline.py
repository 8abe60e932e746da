"""What this machine can do, measured in the run that it is compared with. A side for `benchmarks.sides`."""

from __future__ import annotations

import time

import torch

from benchmarks.serve_side import serve

READ_BYTES = 2**30
TRIES = 3


class Roofline:
    """Rates of all threads together."""

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self._read = torch.ones(READ_BYTES // 4)

    def read_rate(self) -> float:
        """Bytes a second that are read from memory at best."""
        seconds = []
        for _ in range(TRIES):
            started_s = time.perf_counter()
            self._read.sum()
            seconds.append(time.perf_counter() - started_s)
        return READ_BYTES / min(seconds)


if __name__ == "__main__":
    serve(Roofline)
