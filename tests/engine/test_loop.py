"""The loop when nodes are lost: everything is replayed, nothing is drawn twice, nothing is forgotten. No processes."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from testing.fakes import FakeLink, FakeStage
from testing.waiting import wait_for
from tokenizers import Tokenizer
from torch import Tensor

from mdi.core.batch import Batch, Token, token_bits
from mdi.core.errors import ClosedError, LinkError, MDIError
from mdi.core.outputs import Completion, Piece
from mdi.core.outputs import Sample as OneSample
from mdi.core.sampling import SamplingParams
from mdi.engine.embedding_cache import EmbeddingCache
from mdi.engine.grammar import Matcher
from mdi.engine.loop import Cancel, Close, Inbox, StepLoop, Submit
from mdi.engine.scheduler import Scheduler
from mdi.engine.sequence import Request
from mdi.engine.sequence import Sequence as Sample
from mdi.engine.stream import Stream
from mdi.engine.vision_queue import VisionQueue
from mdi.layers.rope import Grid, MediaSpan
from mdi.media import Patches
from mdi.models.stage import Stage
from mdi.prompt.assembly import Media, Prompt

N_SLOTS = 3
END = 256
LENGTH = 64
GREEDY = SamplingParams(max_tokens=12, temperature=0.0)
WARM = SamplingParams(max_tokens=15, temperature=1.0, seed=5)


class World:
    """A loop over fake nodes, with three slots and batches of five tokens."""

    def __init__(self, tokenizer: Tokenizer, stage: FakeStage | None = None, **link: Any) -> None:
        self.scheduler: Scheduler[Sample] = Scheduler(
            n_slots=N_SLOTS, cache_tokens=N_SLOTS * LENGTH, token_budget=5, max_in_flight=3
        )
        self.ended: list[Request] = []
        self._tokenizer = tokenizer
        self.inbox: Inbox = queue.SimpleQueue()
        first = cast(Stage, stage or FakeStage())
        vision = VisionQueue(first, EmbeddingCache(10**6), None, self.inbox.put)
        self.link = FakeLink(self.inbox.put, **link)
        self.loop = StepLoop(first, self.link, self.inbox, self.scheduler, vision, self.ended.append)

    def close(self) -> None:
        self.loop.close()
        self.link.close()

    def submit(self, prompt: Prompt, params: SamplingParams, matcher: Matcher | None = None) -> Request:
        stream = Stream(lambda: self.inbox.put(Cancel(request)))
        request = Request(stream, params.resolved(SamplingParams(), LENGTH), rule=matcher)
        request.set_prompt(prompt, self._tokenizer, frozenset({END}), LENGTH)
        self.inbox.put(Submit(request))
        return request


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> Tokenizer:
    return Tokenizer.from_file(str(tiny_checkpoint / "tokenizer.json"))


@pytest.fixture
def make_world(tokenizer: Tokenizer) -> Iterator[Callable[..., World]]:
    worlds = []

    def make(**link: Any) -> World:
        worlds.append(World(tokenizer, **link))
        return worlds[-1]

    yield make
    for world in worlds:
        world.close()


def text(words: str) -> Prompt:
    ids = tuple(words.encode())
    return Prompt(ids, torch.arange(len(ids)).repeat(3, 1), delta=0, media=())


def picture() -> Prompt:
    """Two letters, an image of six tokens, one letter; positions as made up as they can be."""
    patches = Patches(np.arange(24 * 2, dtype=np.float32).reshape(24, 2), (1, 4, 6), b"digest")
    media = Media(MediaSpan(2, (1, 4, 6), 2), patches)
    positions = torch.tensor([range(9), range(10, 19), range(20, 29)])
    return Prompt((65, 66, *[0] * 6, 67), positions, delta=-3, media=(media,))


REQUESTS: Sequence[tuple[Prompt, SamplingParams]] = [
    (text("a"), GREEDY),
    (text("a longer prompt, of several chunks"), WARM),
    (picture(), SamplingParams(max_tokens=9, temperature=1.0, seed=8)),
    (text("three at once"), SamplingParams(max_tokens=7, temperature=1.0, seed=6, n=3)),
    (picture(), GREEDY),
]
QUESTIONS: Sequence[tuple[Prompt, SamplingParams]] = [
    (text("the same words as before, and more: a"), GREEDY),
    (text("the same words as before, and more: ab"), WARM),
    (text("the same words as before, and more: "), SamplingParams(max_tokens=4, n=4, seed=2)),
    *REQUESTS,
]


def completions(world: World, requests: Sequence[tuple[Prompt, SamplingParams]] = REQUESTS) -> list[Completion]:
    running = [world.submit(*request) for request in requests]
    return [request.stream.completion() for request in running]


@settings(max_examples=25, deadline=None)
@given(breaks=st.lists(st.integers(0, 12), max_size=8), late=st.booleans())
def test_streams_go_on_with_the_tokens_they_would_have_had(tokenizer: Tokenizer, breaks: list[int], late: bool) -> None:
    undisturbed, disturbed = World(tokenizer), World(tokenizer, breaks=breaks, late=late)
    try:
        expected = completions(undisturbed)
        assert completions(disturbed) == expected
        assert disturbed.scheduler.running == disturbed.scheduler.waiting == disturbed.scheduler.in_flight == 0
        assert disturbed.scheduler._slots.free == N_SLOTS
        assert len(disturbed.ended) == len(REQUESTS)
    finally:
        undisturbed.close()
        disturbed.close()


@settings(max_examples=25, deadline=None)
@given(
    order=st.permutations([*range(len(QUESTIONS)), 0, 1, 2]),
    breaks=st.lists(st.integers(0, 12), max_size=4),
    together=st.booleans(),
)
def test_what_slots_hold_from_before_changes_no_answer(
    tokenizer: Tokenizer, order: list[int], breaks: list[int], together: bool
) -> None:
    world = World(tokenizer, breaks=breaks)
    try:
        each = [order] if together else [[number] for number in order]
        answers = [answer for some in each for answer in completions(world, [QUESTIONS[number] for number in some])]
        assert [answer.samples for answer in answers] == [alone(tokenizer, number) for number in order]
        assert world.scheduler._slots.free == N_SLOTS
    finally:
        world.close()


@cache
def alone(tokenizer: Tokenizer, number: int) -> tuple[OneSample, ...]:
    """The answer of nodes with empty caches."""
    world = World(tokenizer)
    try:
        return completions(world, [QUESTIONS[number]])[0].samples
    finally:
        world.close()


class BrokenGroup(FakeStage):
    """A first stage whose ranks are lost in its third, and in its seventh step."""

    def __init__(self) -> None:
        self._steps = 0

    def run(self, batch: Batch, hidden: Tensor) -> Tensor:
        self._steps += 1
        if self._steps in (3, 7):
            raise LinkError("node secondary0 ended its connection", "secondary0")
        return hidden


def test_a_rank_that_is_lost_in_the_middle_of_a_step_changes_no_token(make_world: Callable[..., World]) -> None:
    expected = completions(make_world())
    world = make_world(stage=BrokenGroup())
    assert completions(world) == expected
    assert world.loop.recovery.recoveries == 2


def test_a_second_question_computes_only_what_is_new(make_world: Callable[..., World]) -> None:
    world = make_world()
    first, second = (completions(world, [question])[0] for question in QUESTIONS[:2])
    assert first.usage.cached_tokens == 0
    assert second.usage.cached_tokens == len(QUESTIONS[0][0].token_ids)


def test_samples_share_their_prompt(make_world: Callable[..., World]) -> None:
    world = make_world()
    prompt = text("one long prompt for all of these samples")
    completions(world, [(prompt, SamplingParams(max_tokens=4, n=3, seed=1, temperature=1.0))])
    assert world.link.computed < len(prompt.token_ids) + 3 * 6


def test_nodes_were_really_lost(make_world: Callable[..., World]) -> None:
    world = make_world(breaks=[0, 3, 0, 5])
    completions(world)
    assert world.loop.recovery.recoveries == 4
    assert not world.loop.recovery.recovering


class InTurns(Matcher):
    """Allows x or y after an even number of answer tokens, z after an odd one, and all after every third."""

    def __init__(self, taken: int = 0) -> None:
        self.complete = False
        self._taken = taken

    def copy(self, field: str | None = None) -> InTurns:
        return InTurns(self._taken)

    def push(self, token_id: int) -> None:
        self._taken += 1

    def mask(self, end_ids: Iterable[int], *, may_end: bool) -> bytes:
        if self._taken % 3 == 2:
            return bytes([255] * 32)
        return bytes(token_bits(b"z" if self._taken % 2 else b"xy"))


@pytest.mark.parametrize("breaks", [(), (0, 2, 5), (1, 1, 1, 1)])
@pytest.mark.parametrize("params", [GREEDY, WARM])
def test_a_token_mask_constrains_the_answer_also_after_a_loss(
    make_world: Callable[..., World], params: SamplingParams, breaks: tuple[int, ...]
) -> None:
    free, masked, undisturbed = make_world(), make_world(breaks=breaks), make_world()
    answers = [
        world.submit(text("mask"), params, matcher).stream.completion()
        for world, matcher in ((free, None), (masked, InTurns()), (undisturbed, InTurns()))
    ]
    constrained = [bytes([token]) for number, token in enumerate(answers[1].token_ids) if number % 3 != 2]
    expected = [b"xy" if number % 2 == 0 else b"z" for number in range(params.max_tokens or 0) if number % 3 != 2]
    assert len(constrained) == len(expected)
    assert all(letter in allowed for letter, allowed in zip(constrained, expected, strict=True))
    assert answers[1] == answers[2] != answers[0]
    assert masked.loop.recovery.recoveries == len(breaks)


@pytest.mark.parametrize("lost_after", range(12))
def test_a_stop_string_is_found_across_a_loss(make_world: Callable[..., World], lost_after: int) -> None:
    whole = completions(make_world(), [(text("ab"), WARM)])[0].text
    stopping = SamplingParams(max_tokens=15, temperature=1.0, seed=5, stop=whole[6:9])
    [cut] = completions(make_world(breaks=[lost_after]), [(text("ab"), stopping)])
    assert cut.text == whole[: whole.index(whole[6:9])]
    assert cut.finish_reason == "stop"


def test_requests_are_taken_in_and_images_encoded_while_nodes_are_away(make_world: Callable[..., World]) -> None:
    expected = completions(make_world(), [(picture(), WARM), (text("new"), GREEDY)])
    world = make_world(stays_away=True)
    world.link.lose()
    assert world.link.asked_to_recover.wait(10)
    requests = [world.submit(picture(), WARM), world.submit(text("new"), GREEDY)]
    wait_for(lambda: requests[0].encoded)
    assert world.loop.recovery.recovering
    assert requests[0].stream.completion_tokens == 0
    world.link.come_back()
    assert [request.stream.completion() for request in requests] == expected


def test_a_request_cancelled_while_nodes_are_away_leaves_at_once(make_world: Callable[..., World]) -> None:
    world = make_world(stays_away=True)
    requests = [world.submit(text("to be left"), WARM) for _ in range(N_SLOTS + 2)]
    next(requests[0].stream)
    world.link.lose()
    assert world.link.asked_to_recover.wait(10)
    for request in requests:
        request.stream.cancel()
    for request in requests:
        list(request.stream)
    assert world.scheduler.running == world.scheduler.waiting == 0
    world.link.come_back()
    assert completions(world, [(text("next"), GREEDY)])[0].finish_reason == "length"


def test_a_request_cancelled_in_the_batch_that_is_lost_leaves(make_world: Callable[..., World]) -> None:
    world = make_world(stays_away=True)
    world.link.swallows = True
    request = world.submit(text("in flight"), WARM)
    wait_for(lambda: world.scheduler.in_flight > 0)
    request.stream.cancel()
    wait_for(lambda: request.cancelled)
    assert not world.ended
    world.link.lose()
    assert list(request.stream) == []
    assert world.ended == [request]


def test_nodes_lost_for_good_fail_what_runs_and_what_comes(make_world: Callable[..., World]) -> None:
    world = make_world(stays_away=True)
    requests = [world.submit(text("unlucky"), WARM) for _ in range(5)]
    next(requests[0].stream)
    world.link.lose()
    assert world.link.asked_to_recover.wait(10)
    world.link.give_up()
    for request in requests:
        with pytest.raises(LinkError, match="secondary0 was lost too often"):
            list(request.stream)
    assert world.loop.recovery.failed_requests == 5
    assert not world.loop.recovery.recovering
    with pytest.raises(LinkError, match="secondary0"):
        list(world.submit(text("late"), GREEDY).stream)


def test_closing_while_nodes_are_away_fails_what_runs(make_world: Callable[..., World]) -> None:
    world = make_world(stays_away=True)
    request = world.submit(text("unlucky"), WARM)
    next(request.stream)
    world.link.lose()
    assert world.link.asked_to_recover.wait(10)
    world.inbox.put(Close())
    with pytest.raises(ClosedError):
        list(request.stream)
    assert world.loop.recovery.failed_requests == 0


def test_an_answer_that_cannot_be_read_ends_its_own_request_only(
    make_world: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    append = Sample.append

    def broken(sequence: Sample, drawn: Sequence[Token]) -> Piece | None:
        if sequence.request.sampling.seed == 6 and len(sequence.generated) == 3:
            raise RuntimeError("no such byte")
        return append(sequence, drawn)

    monkeypatch.setattr(Sample, "append", broken)
    world = make_world()
    good = world.submit(text("abc"), WARM)
    bad = world.submit(text("abc"), WARM.model_copy(update={"seed": 6, "n": 2}))
    with pytest.raises(MDIError, match="server's log"):
        bad.stream.completion()
    assert good.stream.completion().samples[0].finish_reason
    assert world.loop.error is None
    wait_for(lambda: world.scheduler.running == 0 and len(world.ended) == 2)


class SlowStage(FakeStage):
    """Notes the order of its work: "run" for a batch, "part" for a part of an image, of which there are 200."""

    def __init__(self) -> None:
        self.done: list[str] = []

    def run(self, batch: Batch, hidden: torch.Tensor) -> torch.Tensor:
        time.sleep(0.004)
        self.done.append("run")
        return hidden

    def encode_steps(self, rows: torch.Tensor, grid: Grid) -> Generator[None, None, torch.Tensor]:
        for _ in range(200):
            time.sleep(0.001)
            self.done.append("part")
            yield
        return (yield from super().encode_steps(rows, grid))


def test_streams_and_the_encoding_of_an_image_take_turns(make_world: Callable[..., World]) -> None:
    stage = SlowStage()
    world = make_world(stage=stage)
    stream = world.submit(text("a"), SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)).stream
    next(stream)
    seeing = world.submit(picture(), GREEDY).stream
    assert len(list(stream)) > 10
    turns = [len(list(turn)) for what, turn in groupby(stage.done[stage.done.index("part") :]) if what == "part"]
    streamed = turns[:-1]  # the last one ends alone
    assert len(streamed) > 10
    assert max(streamed) < 50  # some 4 where the machine is not busy
    assert seeing.completion().text


@pytest.mark.parametrize("breaks", [(), (0, 2, 5), (1, 1, 1, 1), (3, 0, 0, 4)])
def test_logprobs_of_a_prompt_come_once_whatever_is_lost(
    make_world: Callable[..., World], breaks: tuple[int, ...]
) -> None:
    prompt = text("a longer prompt, of several chunks")
    expected = make_world().submit(prompt, WARM).stream.completion()
    world = make_world(breaks=breaks)
    requests = [world.submit(prompt, WARM.model_copy(update={"prompt_logprobs": 0, "n": n})) for n in (1, 2)]
    for request in requests:
        answer = request.stream.completion()
        assert answer.samples[0].token_ids == expected.samples[0].token_ids
        assert tuple(token.id for token in request.stream.prompt_logprobs) == prompt.token_ids[1:]


def test_steps_of_a_request_are_timed_in_order(make_world: Callable[..., World]) -> None:
    world = make_world()
    before_s = time.monotonic()
    words, shown = world.submit(text("some words"), GREEDY), world.submit(picture(), GREEDY)
    for request in (words, shown):
        request.stream.completion()
        timing = request.stream.timing
        steps = (timing.arrived_s, timing.prepared_s, timing.scheduled_s, timing.first_token_s, timing.last_token_s)
        times = [before_s, *(step for step in steps if step is not None), time.monotonic()]
        assert len(times) == len(steps) + 2
        assert times == sorted(times)
    assert words.stream.timing.encoded_s is None
    encoded_s, scheduled_s = shown.stream.timing.encoded_s, shown.stream.timing.scheduled_s
    assert encoded_s is not None
    assert scheduled_s is not None
    assert encoded_s <= scheduled_s


def test_batches_and_what_losses_cost_are_measured(make_world: Callable[..., World]) -> None:
    """Nothing is shared between these prompts: each token is computed once, and what was lost once more."""
    requests = [(text("a longer prompt, of several chunks"), GREEDY), (text("another"), GREEDY)]
    undisturbed, disturbed = make_world(), make_world(breaks=[9])
    for world in (undisturbed, disturbed):
        completions(world, requests)
    calm, rough = undisturbed.loop.measurements, disturbed.loop.measurements
    tokens = sum(len(prompt.token_ids) + params.max_tokens - 1 for prompt, params in requests if params.max_tokens)
    assert calm.batch_tokens.total == tokens
    assert sum(calm.batch_tokens.counts) == undisturbed.loop.results
    assert (calm.replayed_tokens, sum(calm.recovery_s.counts)) == (0, 0)
    assert 0 < rough.replayed_tokens <= rough.batch_tokens.total - tokens
    assert sum(rough.recovery_s.counts) == 1
    [(began_s, ended_s)] = rough.recoveries
    assert rough.recovery_s.total == ended_s - began_s > 0
