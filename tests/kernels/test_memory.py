"""Memory of packed weights: many in one block, given back with the last of them."""

from __future__ import annotations

import subprocess
import sys
from ctypes import c_size_t, c_void_p

from mdi.kernels.library import library

GIVEN_BACK = """
import ctypes
import psutil
from mdi.kernels.library import library

MIB = 2**20


def ends(address, size):
    return ctypes.string_at(address, 1) + ctypes.string_at(address + size - 1, 1)


allocate = library().shared("allocate", ctypes.c_size_t, result=ctypes.c_void_p)
free = library().shared("free", ctypes.c_void_p)
before = psutil.Process().memory_info().rss
parts = [(allocate(size), size) for size in (5 * MIB + 1, 3, 40 * MIB, 20 * MIB, 9 * MIB)]
for number, (address, size) in enumerate(parts):
    assert address % 4096 == 0
    assert ends(address, size) == bytes(2)
    ctypes.memset(address, number + 1, size)
assert psutil.Process().memory_info().rss > before + 70 * MIB
for number, (address, size) in enumerate(parts):
    assert ends(address, size) == bytes([number + 1]) * 2
    free(address)
assert psutil.Process().memory_info().rss < before + 10 * MIB
"""


def test_a_block_is_given_back_with_its_last_part() -> None:
    """In a process of its own: blocks of weights that other tests hold would have room for parts."""
    subprocess.run([sys.executable, "-c", GIVEN_BACK], check=True, timeout=60)


def test_what_no_machine_has_is_refused() -> None:
    loaded = library()
    assert loaded is not None
    assert loaded.shared("allocate", c_size_t, result=c_void_p)(2**62) is None
