"""A measured machine: how fast it reads weights and multiplies, and its free memory. Speeds are kept in a file."""

from __future__ import annotations

import contextlib
import json
import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from mdi.core.dtypes import parse_dtype
from mdi.core.quantization import FORMATS, QuantizedTensor
from mdi.core.tensors import TensorSpec
from mdi.kernels.threads import computes_with
from mdi.layers.linear import Linear
from mdi.layers.quantize import quantize
from mdi.planning.memory import free_bytes

FILE_NAME = "speed.json"
WIDTH = 2048
READ_BYTES = 256 * 2**20  # more than any cache holds
PROMPT_ROWS = 512
SHORTEST_S = 0.2
USABLE_SHARE = 0.9  # of the free memory: other processes need some


@dataclass(frozen=True)
class Machine:
    """The speeds and the memory of a node's machine. Machines of the default have equal speeds and enough memory.

    bytes_per_s: of weights read for one token. flops_per_s: of products with many rows. memory_bytes: for a stage.
    """

    bytes_per_s: float = 1.0
    flops_per_s: float = math.inf
    memory_bytes: float = math.inf

    def token_s(self, step_bytes: float) -> float:
        """Seconds for a token of an answer."""
        return step_bytes / self.bytes_per_s

    def prompt_token_s(self, parameters: float) -> float:
        """Seconds for a token of a prompt, which takes a multiplication and an addition for each parameter."""
        return 2 * parameters / self.flops_per_s


@dataclass(frozen=True)
class LinkSpeed:
    """The link between two nodes. rtt_s: there and back, of a small message. bytes_per_s: of large ones, one way."""

    rtt_s: float
    bytes_per_s: float


def measure_hardware(device: str, dtype: str, folder: Path | None, quantization: str | None = None) -> Machine:
    """This machine, with its free memory. The first measurement of its speeds takes a second or two.

    folder: where the speeds are kept; None measures them every time. quantization: of the weights.
    """
    memory_bytes = free_bytes(torch.device(device)) * USABLE_SHARE
    quantization = FORMATS[quantization].rounding.name if quantization else None
    known, key = _read(folder), _key(device, f"{dtype} x {quantization}" if quantization else dtype)
    if key not in known:
        known[key] = measure_speed(device, dtype, quantization)
        _write(folder, known)
    bytes_per_s, flops_per_s = known[key]
    return Machine(bytes_per_s, flops_per_s, memory_bytes)


def measure_speed(device: str, dtype: str, quantization: str | None = None) -> tuple[float, float]:
    """Bytes per second of weights read for one token, and operations per second in a prompt."""
    kind, place = parse_dtype(dtype), torch.device(device)
    count = max(1, READ_BYTES // (WIDTH**2 * (1 if quantization else kind.itemsize)))
    weight = torch.full((WIDTH, WIDTH), 0.01, dtype=kind)
    made = quantize(weight, FORMATS[quantization]) if quantization else weight
    get = _Alike(made.to(place), kind)
    layers = [Linear.load(get, {"weight": WIDTH}, WIDTH) for _ in range(count)]
    one, many = (torch.ones(rows, WIDTH, dtype=kind, device=place) for rows in (1, PROMPT_ROWS))

    def read() -> None:
        for layer in layers:
            layer(one)
        _wait_for(place)

    def multiply() -> None:
        layers[0](many)
        _wait_for(place)

    with torch.inference_mode():
        read_s, multiply_s = _seconds(read), _seconds(multiply)
    size_bytes = TensorSpec((WIDTH, WIDTH), quantization or dtype).size_bytes
    return count * size_bytes / read_s, 2 * PROMPT_ROWS * WIDTH**2 / multiply_s


@dataclass(frozen=True)
class _Alike:
    """A `GetTensor` whose matrices are one weight."""

    weight: torch.Tensor | QuantizedTensor
    dtype: torch.dtype

    def __call__(self, name: str, _shape: tuple[int, ...], _dtype: str | None = None, /) -> torch.Tensor:
        raise KeyError(name)

    def matrix(self, _name: str, _shape: tuple[int, ...], /) -> torch.Tensor | QuantizedTensor:
        return self.weight if isinstance(self.weight, QuantizedTensor) else self.weight.clone()


def _seconds(work: Callable[[], None]) -> float:
    """The time of the fastest of several runs: other processes only slow a run down."""
    work()
    best, began_s = float("inf"), time.perf_counter()
    while time.perf_counter() - began_s < SHORTEST_S:
        before_s = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - before_s)
    return best


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _key(device: str, dtype: str) -> str:
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.processor()
    return f"{platform.node()}, {device} {name}, {dtype}, {computes_with()}"


def _read(folder: Path | None) -> dict[str, tuple[float, float]]:
    """Speeds that were measured before; none where the file is missing or damaged."""
    try:
        found = json.loads((folder / FILE_NAME).read_text()) if folder else {}
        return {key: (float(reads), float(multiplies)) for key, (reads, multiplies) in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _write(folder: Path | None, known: dict[str, tuple[float, float]]) -> None:
    """Keeps the speeds. Where that is impossible, they are measured again next time."""
    if folder:
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            (folder / FILE_NAME).write_text(json.dumps(known, indent=1))
