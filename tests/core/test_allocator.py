"""D12: threads share a few heaps, so that memory stays flat over many requests."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mdi.core.allocator import MAX_ARENAS

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")

MANY_THREADS = """
import ctypes, threading
from mdi.core.allocator import limit_arenas
limit_arenas()
held, ready, done = [], threading.Barrier(33), threading.Event()
def hold():
    held.append([bytes(1000) for _ in range(100)])
    ready.wait()
    done.wait()
for _ in range(32):
    threading.Thread(target=hold).start()
ready.wait()
ctypes.CDLL(None).malloc_stats()
done.set()
"""

IDLE = """
import queue, threading, time, psutil
from mdi.core import allocator
allocator.IDLE_S = 0.1
items = queue.SimpleQueue()
blocks = [bytes(50_000) for _ in range(1000)]
pinned = blocks[-1]  # at the end of the heap, which glibc would not shrink by itself
del blocks
full = psutil.Process().memory_info().rss
threading.Timer(0.5, lambda: items.put(psutil.Process().memory_info().rss)).start()
print(full - allocator.next_item(items))
items.put("at once")
print(allocator.next_item(items))
"""


def test_an_idle_thread_gives_free_memory_back() -> None:
    done = subprocess.run([sys.executable, "-c", IDLE], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    returned_bytes, item = done.stdout.splitlines()
    assert int(returned_bytes) > 30_000_000
    assert item == "at once"


def test_threads_share_a_few_heaps() -> None:
    done = subprocess.run([sys.executable, "-c", MANY_THREADS], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert 1 <= done.stderr.count("Arena ") <= MAX_ARENAS
