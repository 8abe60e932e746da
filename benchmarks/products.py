"""Products alone, in every type, against what this machine reads and computes in the same run.

    python -m benchmarks.products [--threads 2] [--rows 1 6 512] [--kinds bfloat16 int8]

A product of few rows is bound by memory: its part of the roofline is the bytes of the packed weight over the time, as a
part of a streaming read's rate. One of many rows is bound by the processor: its part of the peak is its operations over
the time, as a part of those of a loop over registers. Weights are taken in turn, more of them than caches hold. Each
figure is the best of several turns, in which roofline, peak and every number of rows alternate.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from mdi.core.quantization import FORMATS, QuantizedTensor
from mdi.core.tensors import TensorSpec
from mdi.kernels.library import Library, library
from mdi.kernels.packed import PackedWeight, product

SHAPES = [(2048, 1536), (1536, 1536), (17920, 1536), (1536, 8960), (151936, 1536)]  # outputs, inputs of Qwen2-VL-2B
ROWS = [1, 2, 4, 6, 8, 16, 64, 512]
KINDS = ["float32", "bfloat16", "float16", "int8", "int8-32", "int8-32-minimums", "int4", "int4-zeros", "int4-minimums"]
WEIGHT_BYTES = 400 << 20  # of all copies: caches hold a tenth
READ_BYTES = 512 << 20
TURNS = 5
MOST_OPERATIONS = 4e11  # a head of 151,936 outputs is not multiplied with 512 rows


@dataclass
class Limits:
    """The best rates so far: bytes a second, operations a second on float32, bfloat16 and int8."""

    library: Library
    memory: int
    bytes: float = 0
    floats: float = 0
    bf16: float = 0
    int8: float = 0

    @staticmethod
    def of(loaded: Library) -> Limits:
        """With memory in huge pages, as packed weights are, that has been written."""
        memory = loaded.shared("allocate", ctypes.c_size_t, result=ctypes.c_void_p)(READ_BYTES)
        ctypes.memset(memory, 1, READ_BYTES)
        return Limits(loaded, memory)

    def measure(self, threads: int) -> None:
        read = self.library.kernel("limit_read", ctypes.c_void_p, ctypes.c_size_t, result=ctypes.c_int)
        self.bytes = max(self.bytes, READ_BYTES / _seconds(lambda: read(self.memory, READ_BYTES)))
        for name in ("floats", "bf16", "int8"):
            compute = self.library.kernel(f"limit_{name}", ctypes.c_long, result=ctypes.c_long)
            steps = int(2e9 / compute(1))
            operations = compute(1) * steps * threads
            rate = operations / _seconds(lambda compute=compute, steps=steps: compute(steps))  # type: ignore[misc]
            setattr(self, name, max(getattr(self, name), rate))

    def of_kind(self, kind: str) -> float:
        """Operations a second at which this kind of weight is multiplied."""
        return self.int8 if kind in FORMATS else self.bf16 if kind == "bfloat16" else self.floats


def packed(kind: str, outputs: int, inputs: int) -> PackedWeight:
    if kind not in FORMATS:
        return PackedWeight.pack(torch.randn(outputs, inputs).to(getattr(torch, kind)))
    format_ = FORMATS[kind]
    values = torch.randint(0, 256, (outputs, inputs * format_.bits // 8), dtype=torch.uint8)
    scales = torch.ones(outputs, inputs // format_.group if format_.group else 1)
    return PackedWeight.pack(
        QuantizedTensor(
            format_,
            values if format_.bits == 4 else values.view(torch.int8),
            scales,
            torch.full_like(scales, 7, dtype=torch.uint8) if format_.zeros else None,
            minimums=scales if format_.minimums else None,
        )
    )


def weight_bytes(kind: str, outputs: int, inputs: int) -> int:
    return TensorSpec((outputs, inputs), kind).size_bytes


def turns(weights: list[PackedWeight]) -> Iterator[PackedWeight]:
    while True:
        yield from weights


def best_seconds(kind: str, shape: tuple[int, int], rows: list[int], limits: Limits, threads: int) -> dict[int, float]:
    """The time of one product by number of rows."""
    outputs, inputs = shape
    copies = max(1, WEIGHT_BYTES // weight_bytes(kind, outputs, inputs))
    weights = turns([packed(kind, outputs, inputs) for _ in range(copies)])
    dtype = torch.bfloat16 if kind in FORMATS else getattr(torch, kind)
    best = dict.fromkeys(rows, float("inf"))
    for _ in range(TURNS):
        limits.measure(threads)
        for count in rows:
            x = torch.randn(count, inputs).to(dtype)
            calls = max(1, min(copies, int(2e9 / (2 * count * outputs * inputs))))
            for _ in range(3):
                spent_s = _seconds(lambda x=x, calls=calls: [product(next(weights), x) for _ in range(calls)])  # type: ignore[misc]
                best[count] = min(best[count], spent_s / calls)
    return best


def _seconds(work: Callable[[], object]) -> float:
    before_s = time.perf_counter()
    work()
    return time.perf_counter() - before_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--shapes", type=int, nargs="+", default=range(len(SHAPES)), help="by number: 0 to 4")
    options = parser.parse_args()
    loaded = library()
    assert loaded is not None, "build the library first: python -m mdi.kernels.build"
    loaded.shared("set_threads", ctypes.c_int)(options.threads)
    print(f"{loaded.isa}, {options.threads} threads; ms, GB/s of weights (part of the read), Gop/s (part of the peak)")
    limits = Limits.of(loaded)
    for kind in options.kinds:
        for outputs, inputs in (SHAPES[index] for index in options.shapes):
            rows = [count for count in options.rows if 2.0 * count * outputs * inputs < MOST_OPERATIONS / 8]
            best = best_seconds(kind, (outputs, inputs), rows, limits, options.threads)
            peak = limits.of_kind(kind)
            print(f"{kind} {inputs}x{outputs}: read {limits.bytes / 1e9:.1f} GB/s, peak {peak / 1e9:.0f} Gop/s")
            for count, spent_s in best.items():
                read = weight_bytes(kind, outputs, inputs) / spent_s
                done = 2 * count * outputs * inputs / spent_s
                print(
                    f"  {count:4d} rows {spent_s * 1e3:8.3f} ms  {read / 1e9:6.1f} ({read / limits.bytes:.2f})"
                    f"  {done / 1e9:7.1f} ({done / peak:.2f})",
                    flush=True,
                )


if __name__ == "__main__":
    main()
