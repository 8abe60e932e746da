"""The step loop: encode, compute, handle events. Its thread owns slots, sequences and the first stage.

Other threads reach it through its inbox only. Knows batches and links, and no messages, media or HTTP.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count, islice

from mdi.cluster.delivery import Delivery, GaveUp, Link, Rewired
from mdi.core.allocator import next_item
from mdi.core.batch import Batch, Result, Token
from mdi.core.dtypes import dtype_name
from mdi.core.errors import ClosedError, InputError, LinkError, MDIError, NumbersError
from mdi.core.histogram import Histogram
from mdi.core.status import CacheStatus, Measurements, RecoveryStatus
from mdi.engine.packing import pack
from mdi.engine.prefill_budget import PrefillBudget
from mdi.engine.scheduler import ScheduledSlice, Scheduler
from mdi.engine.sequence import Request, Sequence
from mdi.engine.vision_queue import EncodeDone, VisionQueue
from mdi.models.stage import Stage

log = logging.getLogger(__name__)

BATCH_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)  # as in vLLM
MOST_RECOVERIES = 16  # whose times are kept
RECOVERY_S = (0.5, 1.0, 2.0, 3.0, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0)


@dataclass(frozen=True)
class Submit:
    """A request whose prompt and sequences are ready."""

    request: Request


@dataclass(frozen=True)
class Cancel:
    """A request whose caller has left."""

    request: Request


@dataclass(frozen=True)
class Close:
    """End the loop; running requests fail with ClosedError."""


Event = Submit | Cancel | Close | EncodeDone | Delivery
Inbox = queue.SimpleQueue[Event]


class StepLoop:
    """Runs requests through the pipeline until closed, or until nodes are lost for good.

    While the link brings lost nodes back, the loop still accepts requests and encodes images. Then every running
    sequence is computed again from its first token on, and continues with the tokens it would have had.

    link: to the other nodes, which delivers into `inbox`; None when this node is the only one.
    ended: called with every request that ends, for any reason.
    """

    def __init__(
        self,
        stage: Stage,
        link: Link | None,
        inbox: Inbox,
        scheduler: Scheduler[Sequence],
        vision: VisionQueue,
        ended: Callable[[Request], None],
    ) -> None:
        self.error: MDIError | None = None
        self.recovery = RecoveryStatus(recovering=False, recoveries=0, failed_requests=0)
        self.results = 0  # batches that came back
        self._stage = stage
        self._link = link
        self._inbox = inbox
        self._scheduler = scheduler
        self._vision = vision
        self._ended = ended
        self._live: set[Request] = set()
        self._in_flight: dict[int, tuple[Batch, list[ScheduledSlice[Sequence]]]] = {}
        self._batch_ids = count()
        self._prefill_budget = PrefillBudget(scheduler.token_budget, scheduler.max_in_flight)
        self._scheduler.prefill_budget = self._prefill_budget.tokens
        self._compute_s = 0.0  # duration of the last `_compute`
        self._batch_tokens = Histogram(BATCH_TOKENS)
        self._recovery_s = Histogram(RECOVERY_S)
        self._lost_s = 0.0  # when nodes were lost last, by time.monotonic
        self._replayed_tokens = 0
        self._recoveries: tuple[tuple[float, float], ...] = ()  # the last ones: when they began and ended
        self._thread = threading.Thread(target=self._run, name="mdi-engine", daemon=True)
        self._thread.start()

    @property
    def cache(self) -> CacheStatus:
        return self._scheduler.cache

    @property
    def measurements(self) -> Measurements:
        """From any thread."""
        vision = self._vision
        return Measurements(
            self._batch_tokens.distribution,
            vision.encode_s.distribution,
            self._recovery_s.distribution,
            self._replayed_tokens,
            media_queries=vision.hits + vision.misses,
            media_hits=vision.hits,
            recoveries=self._recoveries,
        )

    def close(self) -> None:
        """Ends the loop; what runs fails. The link stays open."""
        self._inbox.put(Close())
        self._thread.join()

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
        encoded = self._vision.encode(self._compute_s)  # as long as the streams took: each side gets half of the time
        computed = self._compute()
        self._handle_events(wait=not (encoded or computed))

    def _compute(self) -> bool:
        """Schedules one batch and runs it through the first stage; False when there is none."""
        started_s = time.perf_counter()
        scheduled = [] if self.recovery.recovering else self._scheduler.schedule()
        if scheduled:
            self._run_batch(scheduled)
        self._compute_s = time.perf_counter() - started_s
        return bool(scheduled)

    def _run_batch(self, scheduled: list[ScheduledSlice[Sequence]]) -> None:
        for item in scheduled:
            if (stream := item.sequence.request.stream).timing.scheduled_s is None:
                stream.reached("scheduled_s")
        edits = self._scheduler.take_edits()
        batch, hidden = pack(next(self._batch_ids), scheduled, edits, self._stage.embed)
        self._in_flight[batch.id] = (batch, scheduled)
        started_s, n_tokens = time.perf_counter(), batch.n_tokens
        out = self._stage.run(batch, hidden)
        self._prefill_budget.observe(n_tokens, time.perf_counter() - started_s)
        self._batch_tokens.add(n_tokens)
        self._scheduler.prefill_budget = self._prefill_budget.tokens
        if self._link:
            self._link.send(batch.beyond(self._stage.spec.last_layer), out)
        else:
            result = self._stage.sample(batch, out)
            assert result is not None  # this stage leads its group
            self._collect(result)

    def _handle_events(self, *, wait: bool) -> None:
        """Handles the events in the inbox. wait: for a first one."""
        try:
            self._handle(next_item(self._inbox) if wait else self._inbox.get_nowait())
            while self.error is None:
                self._handle(self._inbox.get_nowait())
        except queue.Empty:
            pass

    def _handle(self, event: Event) -> None:
        match event:
            case Submit(request):
                self._start(request)
            case EncodeDone(request, _, outcome):
                self._vision.take(event)
                if isinstance(outcome, MDIError):
                    self._fail_request(request, outcome)
            case Cancel(request):
                self._cancel(request)
            case Result():
                self._collect(event)
            case LinkError():
                self._recover()
            case Rewired():
                self.recovery = replace(self.recovery, recovering=False)
                self._note_recovery()
                self._recovery_s.add(self._recoveries[-1][1] - self._lost_s)
            case GaveUp(error):
                self._give_up(error)
            case Close():
                self._fail(ClosedError("the engine was closed"))
                self._inbox.put(event)

    def _start(self, request: Request) -> None:
        if request.cancelled:
            self._end(request, None)
            return
        self._live.add(request)
        self._vision.add(request)
        self._scheduler.add(request.sequences)

    def _cancel(self, request: Request) -> None:
        request.cancelled = True
        self._vision.cancel(request)
        if request in self._live:
            for sequence in [sequence for sequence in request.sequences if not sequence.in_flight]:
                self._remove(sequence)

    def _recover(self) -> None:
        """Drops all batches in flight: their tokens will be drawn again, and be the same."""
        self.recovery = replace(self.recovery, recovering=True, recoveries=self.recovery.recoveries + 1)
        self._lost_s = time.monotonic()
        self._in_flight.clear()
        kept = [request for request in self._live if not request.cancelled]
        running = [sequence for request in kept for sequence in request.sequences if sequence.slot is not None]
        self._replayed_tokens += sum(sequence.computed for sequence in running)
        self._scheduler.restart()
        for request in [request for request in self._live if request.cancelled]:
            self._cancel(request)
        assert self._link is not None
        self._link.recover()

    def _note_recovery(self) -> None:
        """One has ended."""
        self._recoveries = (*self._recoveries[-MOST_RECOVERIES + 1 :], (self._lost_s, time.monotonic()))

    def _collect(self, result: Result) -> None:
        """A batch came back: the caches hold its tokens, and every slice with samplings has new ones."""
        if result.batch_id not in self._in_flight:
            return  # sent before the nodes were lost
        batch, scheduled = self._in_flight.pop(result.batch_id)
        self.results += 1
        self._scheduler.finish(scheduled)
        self._drop_overflowed([scheduled[index].sequence for index in result.overflowed])
        tokens = iter(result.tokens)
        for item, part in zip(scheduled, batch.slices, strict=True):
            sequence = item.sequence
            if sequence.index == 0:
                sequence.request.stream.cached_tokens = sequence.cached_tokens or 0
            drawn = tuple(islice(tokens, len(part.samplings)))
            if sequence.slot is None:
                continue  # its request was dropped
            if drawn:
                self._append(sequence, drawn)
            if sequence.slot is not None and (sequence.finished or sequence.request.cancelled):
                self._remove(sequence)

    def _append(self, sequence: Sequence, drawn: tuple[Token, ...]) -> None:
        """Adds tokens to an answer. An error ends this request, and no other."""
        request = sequence.request
        try:
            piece = sequence.append(drawn)
            if request.prefilled and request.stream.timing.first_token_s is None:
                request.stream.reached("first_token_s")
            if sequence.finished:
                request.stream.reached("last_token_s")
            if piece:
                request.stream.put(piece)
        except InputError as error:
            request.error = error
            self._cancel(request)
        except Exception:
            log.exception("the tokens of an answer could not be read")
            request.error = MDIError("the tokens of the answer could not be read; the server's log has the details")
            self._cancel(request)

    def _drop_overflowed(self, sequences: list[Sequence]) -> None:
        """Cancels the requests of sequences that no answer follows from. Nothing takes over what their slots hold."""
        for sequence in sequences:
            sequence.request.error = NumbersError(dtype_name(self._stage.dtype))
            log.error("%s", sequence.request.error)
            sequence.computed = 0
        for request in {sequence.request for sequence in sequences}:
            self._cancel(request)

    def _remove(self, sequence: Sequence) -> None:
        self._scheduler.remove(sequence)
        sequence.request.sequences.remove(sequence)
        if not sequence.request.sequences:
            self._end(sequence.request, sequence.request.error)

    def _end(self, request: Request, error: MDIError | None) -> None:
        self._live.discard(request)
        request.embeddings.clear()
        request.stream.put(error)
        self._ended(request)

    def _fail_request(self, request: Request, error: MDIError) -> None:
        """Ends one request with an error. Its image was not encoded, so none of its sequences is in flight."""
        if request not in self._live:
            return
        self.recovery = replace(self.recovery, failed_requests=self.recovery.failed_requests + 1)
        request.cancelled = True
        for sequence in request.sequences:
            self._scheduler.remove(sequence)
        self._end(request, error)

    def _give_up(self, error: LinkError) -> None:
        failed = self.recovery.failed_requests + len(self._live)
        if self.recovery.recovering:
            self._note_recovery()
        self.recovery = replace(self.recovery, recovering=False, failed_requests=failed)
        self._fail(error)

    def _fail(self, error: MDIError) -> None:
        self.error = error
        for request in list(self._live):
            self._end(request, error)
