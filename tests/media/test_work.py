"""Turns, shared memory and cancellation of the work on media."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial

import pytest
from testing.waiting import wait_for

from mdi.media.work import AbandonedError, Memory, Turns, Work


def started(target: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    return thread


def test_turns_are_given_in_order_of_arrival() -> None:
    turns, order = Turns(1), list[int]()
    turns.take()
    threads = []

    def take(number: int) -> None:
        turns.take()
        order.append(number)
        turns.give_back()

    for number in range(5):
        threads.append(started(partial(take, number)))
        while len(turns._waiting) <= number:
            time.sleep(0.001)
    turns.give_back()
    for thread in threads:
        thread.join()
    assert order == [0, 1, 2, 3, 4]
    assert not turns.wanted


def test_long_work_lets_others_compute_between_its_steps() -> None:
    turns, done = Turns(1), threading.Event()
    film, picture = Work(turns), Work(turns)

    def decode_picture() -> None:
        with picture.computing():
            done.set()

    with film.computing():
        started(decode_picture)
        while not done.is_set():
            film.between_steps()
    assert film.waited_s >= 0
    assert turns._free == 1


def test_who_does_not_fit_waits_and_who_came_first_never_does() -> None:
    memory = Memory(100)
    first, second = Work(memory=memory), Work(memory=memory)
    first.reserve(60)
    waiting = started(lambda: second.reserve(60))
    wait_for(lambda: second in memory._held)
    first.reserve(500)
    assert memory.held_bytes == 560
    first.keep(10)
    waiting.join()
    assert memory.held_bytes == 70
    first.release()
    second.release()
    assert memory.held_bytes == 0


def test_a_turn_is_given_back_while_memory_is_awaited() -> None:
    turns, memory = Turns(1), Memory(100)
    first, second = Work(turns, memory), Work(turns, memory)
    first.reserve(60)

    def decode() -> None:
        with second.computing():
            second.reserve(60)

    waiting = started(decode)
    wait_for(lambda: second in memory._held)
    with first.computing():
        first.keep(0)
    waiting.join()
    assert memory.held_bytes == 60


def test_what_is_reserved_for_a_while_is_given_back() -> None:
    memory = Memory(100)
    work = Work(memory=memory)
    work.reserve(10)
    with work.temporary():
        work.reserve(50)
        assert memory.held_bytes == 60
    assert memory.held_bytes == 10


@pytest.mark.parametrize("how", ["computing", "between steps", "memory"])
def test_cancelled_work_ends(how: str) -> None:
    turns, memory = Turns(1), Memory(100)
    other, work = Work(turns, memory), Work(turns, memory)
    other.reserve(100)
    raised = threading.Event()

    def run() -> None:
        try:
            with work.computing():
                while how == "between steps":
                    work.between_steps()
                work.reserve(50)
        except AbandonedError:
            raised.set()

    if how == "computing":
        work.cancel()
    thread = started(run)
    if how == "memory":
        wait_for(lambda: work in memory._held)
    work.cancel()
    thread.join()
    assert raised.is_set()
    assert turns._free == 1
