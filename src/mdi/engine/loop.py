"""The step loop: schedule, run, collect. Its thread owns slots, sequences and the first stage; others have its inbox.

Knows batches and links; nothing of messages, media or HTTP.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from itertools import islice

import torch
from tokenizers import Tokenizer
from torch import Tensor

from mdi.cluster.delivery import Deliver, GaveUp, Link, Rewired
from mdi.cluster.remote_encoder import Encoded, RemoteEncoder
from mdi.core.batch import Batch, Result, Slice, Visual
from mdi.core.errors import ClosedError, LinkError, MDIError
from mdi.core.status import RecoveryStatus
from mdi.engine.embedding_cache import EmbeddingCache
from mdi.engine.prefill_budget import PrefillBudget
from mdi.engine.scheduler import Scheduler, Work
from mdi.engine.sequence import Request, Sequence
from mdi.models.stage import Stage
from mdi.prompt.detokenizer import Detokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Submit:
    """A request whose prompt is ready."""

    request: Request


@dataclass(frozen=True)
class Cancel:
    """A request nobody waits for any more."""

    request: Request


@dataclass(frozen=True)
class Close:
    """End the loop; running requests fail with ClosedError."""


@dataclass(frozen=True)
class Seen:
    """What the vision node made of the request's next image or video."""

    request: Request
    digest: bytes
    outcome: Encoded


Event = Seen | Submit | Cancel | Close | Result | LinkError | Rewired | GaveUp


class StepLoop:
    """Runs requests through the pipeline until closed, or until nodes are lost for good.

    While the link brings lost nodes back, requests are taken in and images encoded; then every running sequence is
    computed again from its first token on, and goes on with the tokens it would have had.

    connect: given where results go, makes the link to the next node; None when this node is the only one.
    encoded: images and videos of requests before. vision: where others are encoded; None encodes them here.
    ended: told of every request that left, for whatever reason.
    """

    def __init__(
        self,
        stage: Stage,
        connect: Callable[[Deliver], Link] | None,
        scheduler: Scheduler[Sequence],
        tokenizer: Tokenizer,
        end_ids: frozenset[int],
        sequence_length: int,
        encoded: EmbeddingCache,
        vision: RemoteEncoder | None,
        ended: Callable[[Request], None],
    ) -> None:
        self.error: MDIError | None = None
        self.recovery = RecoveryStatus(recovering=False, recoveries=0, failed_requests=0)
        self.results = 0  # batches that came back
        self._stage = stage
        self._scheduler = scheduler
        self._tokenizer = tokenizer
        self._end_ids = end_ids
        self._sequence_length = sequence_length
        self._encoded = encoded
        self._vision = vision
        self._looking = False  # the vision node is
        self._ended = ended
        self._inbox: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._live: dict[Request, list[Sequence]] = {}
        self._in_flight: dict[int, tuple[Batch, list[Work[Sequence]]]] = {}
        self._to_encode: deque[Request] = deque()
        self._encoder: Generator[None, None, Tensor] | None = None
        self._next_batch_id = 0
        self._prefill_budget = PrefillBudget(scheduler.token_budget, scheduler.max_in_flight)
        self._scheduler.prefill_budget = self._prefill_budget.tokens
        self._dispatch_s = 0.0  # how long the last one took
        self._link = connect(self._inbox.put) if connect else None
        self._thread = threading.Thread(target=self._run, name="mdi-engine", daemon=True)
        self._thread.start()

    def post(self, event: Submit | Cancel | Close) -> None:
        """Hands the loop something to act on, from any thread."""
        self._inbox.put(event)

    def close(self) -> None:
        """Ends the loop, failing what runs, and closes the link."""
        self.post(Close())
        self._thread.join()
        if self._link:
            self._link.close()

    def _run(self) -> None:
        try:
            while self.error is None:
                self._step()
        except Exception:
            log.exception("the engine's loop failed")
            self._give_up(LinkError("this node failed while it computed; its log has the details"))
        while not isinstance(event := self._inbox.get(), Close):  # refuse until closed
            if isinstance(event, Submit):
                self._end(event.request, self.error)

    def _step(self) -> None:
        encoded = self._encode()
        started_s = time.perf_counter()
        dispatched = self._dispatch()
        self._dispatch_s = time.perf_counter() - started_s
        self._receive(wait=not (encoded or dispatched))

    def _encode(self) -> bool:
        """Parts of the image being encoded, for as long as the streams just took: both keep half of their pace."""
        until_s = time.perf_counter() + self._dispatch_s
        if self._encoder is None and not self._next_encode():
            return False
        assert self._encoder is not None
        try:
            with self._stage.working("encode"):
                next(self._encoder)
                while time.perf_counter() < until_s:
                    next(self._encoder)
        except StopIteration as done:
            request = self._to_encode[0]
            self._encoded.put(request.next_media.patches.digest, done.value)
            request.embeddings.append(done.value)
            self._encoder = None
        return True

    def _next_encode(self) -> bool:
        """Finds the next image that has to be encoded; whether that begins here."""
        while self._to_encode and not self._looking:
            request = self._to_encode[0]
            if request.encoded or request.cancelled:
                self._to_encode.popleft()
                continue
            patches = request.next_media.patches
            known = self._encoded.get(patches.digest)
            if known is None and self._vision:
                self._looking = True
                self._vision.encode(torch.from_numpy(patches.rows), patches.grid, self._told(request, patches.digest))
                return False
            if known is None:
                self._encoder = self._stage.encode_steps(torch.from_numpy(patches.rows), patches.grid)
                return True
            request.embeddings.append(known)
        return False

    def _told(self, request: Request, digest: bytes) -> Callable[[Encoded], None]:
        return lambda outcome: self._inbox.put(Seen(request, digest, outcome))

    def _see(self, seen: Seen) -> None:
        self._looking = False
        request, outcome = seen.request, seen.outcome
        if isinstance(outcome, Tensor):
            self._encoded.put(seen.digest, outcome)
            if not request.cancelled:
                request.embeddings.append(outcome)
        elif request in self._live:
            failed = self.recovery.failed_requests + 1
            self.recovery = replace(self.recovery, failed_requests=failed)
            request.cancelled = True
            for sequence in self._live[request]:
                self._scheduler.remove(sequence)
            self._end(request, outcome)

    def _dispatch(self) -> bool:
        """Schedules one batch and runs it through the first stage."""
        if self.recovery.recovering:
            return False
        work = self._scheduler.schedule()
        if not work:
            return False
        batch, hidden = self._pack(work)
        self._in_flight[batch.id] = (batch, work)
        started_s = time.perf_counter()
        out = self._stage.run(batch, hidden)
        self._prefill_budget.note(batch.n_tokens, time.perf_counter() - started_s)
        self._scheduler.prefill_budget = self._prefill_budget.tokens
        if self._link:
            self._link.send(batch, out)
        else:
            self._collect(Result(batch.id, self._stage.sample(batch, out)))
        return True

    def _pack(self, work: list[Work[Sequence]]) -> tuple[Batch, Tensor]:
        """The batch of this work, and its embeddings: [tokens, hidden_size]."""
        slices, positions, token_ids, visuals = [], [], list[int](), []
        for item in work:
            sequence, start, end = item.sequence, item.start, item.start + item.length
            assert sequence.slot is not None
            slices.append(Slice(sequence.slot, start, item.length, (sequence.sampling(),) if item.samples else ()))
            positions.append(_positions(sequence, start, end))
            visuals += _visuals(sequence, start, end, row=len(token_ids))
            token_ids += sequence.token_ids(start, end)
        batch = Batch(self._next_batch_id, tuple(slices), torch.cat(positions, dim=1), self._scheduler.take_copies())
        self._next_batch_id += 1
        return batch, self._stage.embed(torch.tensor(token_ids), visuals)

    def _receive(self, *, wait: bool) -> None:
        """Handles what is in the inbox; waits for a first event if asked to."""
        try:
            self._handle(self._inbox.get(block=wait))
            while self.error is None:
                self._handle(self._inbox.get_nowait())
        except queue.Empty:
            pass

    def _handle(self, event: Event) -> None:
        match event:
            case Submit(request):
                self._start(request)
            case Seen():
                self._see(event)
            case Cancel(request):
                self._cancel(request)
            case Result():
                self._collect(event)
            case LinkError():
                self._recover()
            case Rewired():
                self.recovery = replace(self.recovery, recovering=False)
            case GaveUp(error):
                self._give_up(error)
            case Close():
                self._fail(ClosedError("the engine was closed"))
                self._inbox.put(event)

    def _start(self, request: Request) -> None:
        prompt, params = request.prompt, request.sampling
        assert prompt is not None
        if request.cancelled:
            self._end(request, None)
            return
        max_tokens = min(params.max_tokens, self._sequence_length - len(prompt.token_ids))
        ends = params.stop_token_ids | (frozenset() if params.ignore_eos else self._end_ids)
        sequences = [
            Sequence(request, index, prompt, Detokenizer(self._tokenizer, params.stop), max_tokens, ends)
            for index in range(params.n)
        ]
        self._live[request] = sequences
        self._to_encode.append(request)
        self._scheduler.add(sequences)

    def _cancel(self, request: Request) -> None:
        request.cancelled = True
        if self._to_encode and self._to_encode[0] is request:
            self._encoder = None
        for sequence in list(self._live.get(request, ())):
            if not sequence.in_flight:
                self._leave(sequence)

    def _recover(self) -> None:
        """What is in flight is forgotten; tokens it would have brought will be drawn again, and be the same."""
        self.recovery = replace(self.recovery, recovering=True, recoveries=self.recovery.recoveries + 1)
        self._in_flight.clear()
        self._scheduler.restart()
        for request in [request for request in self._live if request.cancelled]:
            self._cancel(request)
        assert self._link is not None
        self._link.recover()

    def _collect(self, result: Result) -> None:
        """A batch came back: the caches hold its tokens, and every slice with samplings has new ones."""
        if result.batch_id not in self._in_flight:
            return  # sent before the nodes were lost
        batch, work = self._in_flight.pop(result.batch_id)
        self.results += 1
        self._scheduler.finish(work)
        tokens = iter(result.tokens)
        for item, part in zip(work, batch.slices, strict=True):
            sequence = item.sequence
            if sequence.index == 0:
                sequence.request.stream.cached_tokens = sequence.reused
            drawn = tuple(islice(tokens, len(part.samplings)))
            if drawn and (piece := sequence.append(drawn)):
                sequence.request.stream.put(piece)
            if sequence.finished or sequence.request.cancelled:
                self._leave(sequence)

    def _leave(self, sequence: Sequence) -> None:
        self._scheduler.remove(sequence)
        sequences = self._live[sequence.request]
        sequences.remove(sequence)
        if not sequences:
            self._end(sequence.request, None)

    def _end(self, request: Request, error: MDIError | None) -> None:
        self._live.pop(request, None)
        request.embeddings.clear()
        request.stream.put(error)
        self._ended(request)

    def _give_up(self, error: LinkError) -> None:
        failed = self.recovery.failed_requests + len(self._live)
        self.recovery = replace(self.recovery, recovering=False, failed_requests=failed)
        self._fail(error)

    def _fail(self, error: MDIError) -> None:
        self.error = error
        for request in list(self._live):
            self._end(request, error)


def _positions(sequence: Sequence, start: int, end: int) -> Tensor:
    """Rotary positions of a sequence's tokens [start, end): int64 [3, end - start]."""
    prompt = sequence.prompt
    if end <= len(prompt.token_ids):
        return prompt.positions[:, start:end]
    n_prompt = max(0, len(prompt.token_ids) - start)
    answer = torch.arange(start + n_prompt, end) + prompt.delta
    return torch.cat((prompt.positions[:, start : start + n_prompt], answer.expand(3, -1)), dim=1)


def _visuals(sequence: Sequence, start: int, end: int, row: int) -> list[Visual]:
    """The parts of the prompt's media that lie in [start, end), which is packed from `row` on."""
    visuals = []
    for media, embeddings in zip(sequence.prompt.media, sequence.request.embeddings, strict=False):
        first, last = max(start, media.span.start), min(end, media.span.start + media.span.length)
        if first < last:
            offset = media.span.start
            visuals.append(Visual(row + first - start, embeddings[first - offset : last - offset]))
    return visuals
