"""What drawing a token needs of all logits of a row: the binding of `c/vocabulary.h`."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from ctypes import c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from mdi.core.group import VOCABULARY_BLOCK
from mdi.kernels.library import library

LEAST_SCALE, LARGEST_SCALE = 1e-30, 1e30  # differences of logits times these are numbers, or minus infinity


class Peaks(ctypes.Structure):
    """`Peaks` of `c/vocabulary.h`."""

    _fields_ = (
        *((name, c_void_p) for name in ("logits", "scales", "highest", "sums")),
        *((name, c_int64) for name in ("rows", "size")),
    )


def compute(logits: Tensor) -> bool:
    """Whether kernels read these logits."""
    return logits.device.type == "cpu" and logits.dtype == torch.float32 and library() is not None


def block_peaks(logits: Tensor, temperatures: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Of each block of each row: the highest logit, and the sum of e^((logit - highest) / temperature).

    logits: float32 [rows, vocab_size]. temperatures: one for each row, above 0. Returns float64 [rows, blocks] each:
    a block is `VOCABULARY_BLOCK` logits, or what is left of them.
    """
    logits = logits.contiguous()
    scales = (1 / torch.tensor(temperatures, dtype=torch.float64)).clamp(LEAST_SCALE, LARGEST_SCALE).float()
    shape = len(logits), -(-logits.shape[1] // VOCABULARY_BLOCK)
    highest, sums = torch.empty(shape), torch.empty(shape, dtype=torch.float64)
    pointers = (tensor.data_ptr() for tensor in (logits, scales, highest, sums))
    _kernels()[0](ctypes.byref(Peaks(*pointers, *logits.shape)))
    return highest.double(), sums


def highest(logits: Tensor, count: int) -> Tensor:
    """The ids of the `count` highest logits, ascending; of equals the first. Fewer where the rest is minus infinity.

    logits: float32 [vocab_size].
    """
    logits, ids = logits.contiguous(), torch.empty(count, dtype=torch.int64)
    found = _kernels()[1](logits.data_ptr(), len(logits), count, ids.data_ptr())
    if found < 0:
        raise MemoryError("no memory to sort logits")
    return ids[:found]


@functools.cache
def _kernels() -> tuple[Callable[..., Any], Callable[..., Any]]:
    loaded = library()
    assert loaded is not None
    return (
        loaded.kernel("peaks", ctypes.POINTER(Peaks)),
        loaded.kernel("highest", c_void_p, c_int64, c_int64, c_void_p, result=c_int64),
    )
