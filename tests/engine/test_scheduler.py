"""Batches of the scheduler: decode first, prefill in chunks, every token once, work for every node."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from mdi.core.batch import CACHE_BLOCK as BLOCK
from mdi.core.batch import Copy, Release
from mdi.engine.scheduler import ScheduledSlice, Scheduler

MUCH = 10**6  # tokens: as if memory were endless


@dataclass(eq=False)
class FakeSequence:
    prompt: int
    answer: int
    drawn: int = 0
    slot: int | None = None
    computed: int = 0
    in_flight: bool = False
    cached_tokens: int | None = None
    arrival: int = 0
    blocked: bool = False

    @property
    def prefix_keys(self) -> list[int]:
        """Like no other's."""
        return [id(self)] * (self.prompt + self.drawn)

    def align_to_media(self, length: int) -> int:
        return length

    @property
    def remaining(self) -> int:
        return self.prompt + self.drawn - self.computed


@dataclass(eq=False)
class SharedPrefix(FakeSequence):
    keys: list[int] = field(default_factory=list)

    @property
    def prefix_keys(self) -> list[int]:
        return self.keys


def finish(scheduler: Scheduler[FakeSequence], work: list[ScheduledSlice[FakeSequence]]) -> None:
    scheduler.finish(work)
    for item in work:
        item.sequence.drawn += item.samples
        if item.sequence.drawn >= item.sequence.answer:
            scheduler.remove(item.sequence)


def test_a_long_prompt_is_prefilled_in_chunks_of_the_token_budget() -> None:
    scheduler: Scheduler[FakeSequence] = Scheduler(n_slots=2, cache_tokens=MUCH, token_budget=8, max_in_flight=1)
    scheduler.add([FakeSequence(prompt=20, answer=2)])
    seen = []
    while work := scheduler.schedule():
        seen += [(item.start, item.length, item.samples) for item in work]
        finish(scheduler, work)
    assert seen == [(0, 8, False), (8, 8, False), (16, 4, True), (20, 1, True)]


def test_decode_goes_first_and_a_prefill_chunk_fills_the_rest() -> None:
    scheduler: Scheduler[FakeSequence] = Scheduler(n_slots=3, cache_tokens=MUCH, token_budget=8, max_in_flight=1)
    short, long = FakeSequence(prompt=3, answer=9), FakeSequence(prompt=30, answer=1)
    scheduler.add([short])
    finish(scheduler, scheduler.schedule())
    scheduler.add([long])
    work = scheduler.schedule()
    assert [(item.sequence, item.length) for item in work] == [(short, 1), (long, 7)]


def test_prompts_take_little_of_a_batch_while_others_decode() -> None:
    scheduler: Scheduler[FakeSequence] = Scheduler(n_slots=3, cache_tokens=MUCH, token_budget=32, max_in_flight=1)
    scheduler.prefill_budget = 4
    scheduler.add([FakeSequence(prompt=3, answer=3)])
    finish(scheduler, scheduler.schedule())
    scheduler.add([FakeSequence(prompt=80, answer=1)])
    lengths = []
    for _ in range(4):
        work = scheduler.schedule()
        lengths.append([item.length for item in work])
        finish(scheduler, work)
    assert lengths == [[1, 4], [1, 4], [32], [32]]


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    """Nor the long one for ever: prompts take turns."""
    scheduler: Scheduler[FakeSequence] = Scheduler(n_slots=8, cache_tokens=MUCH, token_budget=8, max_in_flight=1)
    long = FakeSequence(prompt=80, answer=1)
    scheduler.add([long])
    finish(scheduler, scheduler.schedule())
    steps = 0
    while long.drawn == 0:
        short = FakeSequence(prompt=4, answer=1)
        scheduler.add([short])
        for _ in range(2):
            finish(scheduler, scheduler.schedule())
        assert short.drawn == 1
        steps += 2
        assert steps < 40


def test_sequences_wait_for_a_slot_in_order_of_arrival() -> None:
    scheduler: Scheduler[FakeSequence] = Scheduler(n_slots=1, cache_tokens=MUCH, token_budget=8, max_in_flight=1)
    first, second = FakeSequence(prompt=2, answer=1), FakeSequence(prompt=2, answer=1)
    scheduler.add([first, second])
    work = scheduler.schedule()
    assert [item.sequence for item in work] == [first]
    assert scheduler.waiting == 1
    finish(scheduler, work)
    assert [item.sequence for item in scheduler.schedule()] == [second]


def test_a_sequence_is_in_one_batch_at_a_time() -> None:
    scheduler: Scheduler[FakeSequence] = Scheduler(n_slots=2, cache_tokens=MUCH, token_budget=8, max_in_flight=3)
    scheduler.add([FakeSequence(prompt=20, answer=1)])
    assert scheduler.schedule()
    assert scheduler.schedule() == []


@pytest.mark.parametrize(("n_nodes", "n_sequences"), [(2, 2), (3, 3), (3, 8), (5, 7)])
def test_every_node_has_work_when_there_are_as_many_sequences_as_nodes(n_nodes: int, n_sequences: int) -> None:
    scheduler: Scheduler[FakeSequence] = Scheduler(n_slots=8, cache_tokens=MUCH, token_budget=64, max_in_flight=n_nodes)
    scheduler.add([FakeSequence(prompt=1, answer=99) for _ in range(n_sequences)])
    finish(scheduler, scheduler.schedule())  # all are prefilled by one batch
    batches = [scheduler.schedule() for _ in range(n_nodes)]
    assert all(batches)
    assert scheduler.schedule() == []
    assert sum(map(len, batches)) == n_sequences


def test_sequences_wait_for_their_pictures_outside_the_slots_and_delay_no_other() -> None:
    """D3: however many of them there are."""
    scheduler: Scheduler[FakeSequence] = Scheduler(n_slots=2, cache_tokens=MUCH, token_budget=8, max_in_flight=1)
    blind = [FakeSequence(prompt=4, answer=1, blocked=True) for _ in range(5)]
    plain = FakeSequence(prompt=4, answer=1)
    scheduler.add([*blind, plain])
    work = scheduler.schedule()
    assert [item.sequence for item in work] == [plain]
    finish(scheduler, work)
    assert scheduler.schedule() == []
    assert (scheduler.waiting, scheduler.running) == (5, 0)
    blind[1].blocked = False
    assert [item.sequence for item in scheduler.schedule()] == [blind[1]]


def little_memory(n_blocks: int, max_in_flight: int = 1) -> Scheduler[FakeSequence]:
    return Scheduler(n_slots=4, cache_tokens=n_blocks * BLOCK, token_budget=512, max_in_flight=max_in_flight)


def test_sequences_come_in_as_their_prompts_fit_and_none_passes_another() -> None:
    scheduler = little_memory(8)
    first, large, small = FakeSequence(4 * BLOCK, 2), FakeSequence(4 * BLOCK, 1), FakeSequence(3, 1)
    scheduler.add([first, large, small])
    assert [item.sequence for item in scheduler.schedule()] == [first]  # it may grow yet: no block is left for it
    assert scheduler.waiting == 2


def test_all_that_fit_run_at_once() -> None:
    """Together four times as much could come of them as there is memory."""
    scheduler = little_memory(16)
    sequences = [FakeSequence(prompt=2 * BLOCK, answer=14 * BLOCK) for _ in range(4)]
    scheduler.add(sequences)
    assert [item.sequence for item in scheduler.schedule()] == sequences


def test_without_memory_the_youngest_makes_room_and_comes_again_in_its_turn() -> None:
    scheduler = little_memory(7)
    old, young, last = FakeSequence(BLOCK - 1, 4 * BLOCK), FakeSequence(3 * BLOCK + 5, 2 * BLOCK), FakeSequence(1, 1)
    scheduler.add([old, young])
    finish(scheduler, scheduler.schedule())
    assert scheduler.running == 2
    assert scheduler.cache.used_share == 5 / 7  # one block and four
    while young.slot is not None:
        finish(scheduler, scheduler.schedule())
    assert old.computed == 2 * BLOCK + 1
    assert scheduler.take_edits() == (Release(1, 4 * BLOCK),)  # what it can keep of it, it does
    scheduler.add([last])
    order = []
    while work := scheduler.schedule():
        finish(scheduler, work)
        order += [item.sequence for item in work if item.sequence not in order]
    assert order == [old, young, last]
    assert (scheduler.preemptions, old.drawn, young.drawn, last.drawn) == (1, 4 * BLOCK, 2 * BLOCK, 1)


def test_a_sequence_in_flight_keeps_its_memory() -> None:
    scheduler = little_memory(4, max_in_flight=2)
    old, young = FakeSequence(BLOCK, 2 * BLOCK), FakeSequence(2 * BLOCK - 1, BLOCK)
    scheduler.add([old])
    finish(scheduler, scheduler.schedule())
    scheduler.add([young])
    flying = [scheduler.schedule(), scheduler.schedule()]
    for _ in range(20 * BLOCK):
        assert all(item.sequence.slot is not None for batch in flying for item in batch)
        if work := scheduler.schedule():
            flying.append(work)
        elif flying:
            finish(scheduler, flying.pop(0))
    assert (scheduler.preemptions, old.drawn, young.drawn) == (1, 2 * BLOCK, BLOCK)


def test_a_copy_counts_its_tokens() -> None:
    scheduler = little_memory(5)
    keys = list(range(2 * BLOCK))
    first, second, third = (SharedPrefix(2 * BLOCK, 1, keys=keys) for _ in range(3))
    scheduler.add([first])
    scheduler.finish(scheduler.schedule())
    scheduler.add([second, third])
    assert scheduler.schedule()
    assert scheduler.take_edits() == (Copy(0, 1, 2 * BLOCK - 1),)
    assert (scheduler.running, scheduler.waiting) == (2, 1)


@pytest.mark.parametrize("seed", range(20))
def test_random_loads_compute_every_token_once_in_order_and_end(seed: int) -> None:
    rng = random.Random(seed)
    n_nodes, n_slots, n_blocks = rng.randint(1, 5), rng.randint(1, 6), rng.randint(3, 12)
    scheduler: Scheduler[FakeSequence] = Scheduler(
        n_slots=n_slots,
        cache_tokens=n_blocks * BLOCK,
        token_budget=rng.randint(n_slots, 200),
        max_in_flight=n_nodes,
    )
    sequences = [FakeSequence(rng.randint(1, 2 * BLOCK), rng.randint(1, BLOCK)) for _ in range(25)]
    pending, flying = list(sequences), list[list[ScheduledSlice[FakeSequence]]]()
    for _ in range(10_000):
        arrivals = [pending.pop() for _ in range(min(len(pending), rng.randint(0, 2)))]
        scheduler.add(arrivals)
        if work := scheduler.schedule():
            flying.append(work)
            assert sum(item.length for item in work) <= scheduler.token_budget
            assert all(item.start == item.sequence.computed for item in work)
            busy = [item.sequence for batch in flying for item in batch]
            assert len(set(map(id, busy))) == len(busy)
            assert len({sequence.slot for sequence in busy}) == len(busy)
        elif flying:
            finish(scheduler, flying.pop(0))
        elif not pending:
            break
    assert all(sequence.drawn == sequence.answer for sequence in sequences)
    assert scheduler.waiting == scheduler.running == scheduler.in_flight == 0
