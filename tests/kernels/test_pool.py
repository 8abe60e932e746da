"""The pool of threads: every thread runs every task once, whoever asks, and however few cores there are."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from ctypes import CFUNCTYPE, c_int, c_void_p
from pathlib import Path

import pytest

from mdi.kernels.library import Library, library

TASK = CFUNCTYPE(None, c_void_p, c_int, c_int)


class Pool:
    """The pool of this process's library."""

    def __init__(self, loaded: Library) -> None:
        self.threads = loaded.shared("threads", result=c_int)
        self.set_threads = loaded.shared("set_threads", c_int)
        self.barrier = loaded.shared("barrier")
        self.parallel = loaded.shared("parallel", TASK, c_void_p)

    def run(self, n_barriers: int = 0) -> list[tuple[int, int, int]]:
        """Runs a task that meets at barriers: (barriers passed, thread, threads) in the order in which it got there."""
        seen = list[tuple[int, int, int]]()

        def task(_context: int | None, thread: int, n_threads: int) -> None:
            for passed in range(n_barriers + 1):
                if passed:
                    self.barrier()
                seen.append((passed, thread, n_threads))

        self.parallel(TASK(task), None)
        return seen


@pytest.fixture
def pool() -> Iterator[Pool]:
    loaded = library()
    assert loaded is not None
    pool = Pool(loaded)
    before = pool.threads()
    yield pool
    pool.set_threads(before)


def everybody(n_threads: int, n_barriers: int = 0) -> list[tuple[int, int, int]]:
    return [(passed, thread, n_threads) for passed in range(n_barriers + 1) for thread in range(n_threads)]


@pytest.mark.parametrize("n_threads", [1, 2, 3, 8])
def test_every_thread_runs_every_task_once_and_waits_at_barriers(pool: Pool, n_threads: int) -> None:
    pool.set_threads(n_threads)
    for _ in range(20):
        seen = pool.run(n_barriers=3)
        assert sorted(seen) == everybody(n_threads, n_barriers=3)
        assert [passed for passed, _, _ in seen] == sorted(passed for passed, _, _ in seen)


def test_the_number_of_threads_may_change_between_tasks(pool: Pool) -> None:
    for n_threads in (4, 1, 2, 0, 8, 3):
        pool.set_threads(n_threads)
        assert sorted(pool.run()) == everybody(max(1, n_threads))


def test_callers_from_several_threads_take_turns(pool: Pool) -> None:
    pool.set_threads(2)
    results = list[list[tuple[int, int, int]]]()
    callers = [
        threading.Thread(target=lambda: results.extend(pool.run(n_barriers=2) for _ in range(25))) for _ in range(4)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(results) == 100
    assert all(sorted(seen) == everybody(2, n_barriers=2) for seen in results)


def test_tasks_of_one_thread_run_at_the_same_time(pool: Pool) -> None:
    pool.set_threads(1)
    both_run = threading.Barrier(2, timeout=20)

    def wait(_context: int | None, _thread: int, _n_threads: int) -> None:
        both_run.wait()

    callers = [threading.Thread(target=pool.parallel, args=(TASK(wait), None)) for _ in range(2)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not both_run.broken


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="this system does not show its threads' states")
def test_threads_that_wait_sleep(pool: Pool) -> None:
    pool.set_threads(8)
    before = set(Path("/proc/self/task").iterdir())
    pool.run()
    workers = set(Path("/proc/self/task").iterdir()) - before
    assert len(workers) == 7
    while any(state(worker) != "S" for worker in workers):  # ends by the test's time limit where one spins
        threading.Event().wait(0.01)


def state(thread: Path) -> str:
    """R: runs, S: sleeps."""
    return (thread / "stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_the_child_of_a_fork_starts_threads_of_its_own(pool: Pool) -> None:
    pool.set_threads(3)
    pool.run()
    child = os.fork()
    if not child:
        os._exit(0 if sorted(pool.run(n_barriers=2)) == everybody(3, n_barriers=2) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert sorted(pool.run()) == everybody(3)
