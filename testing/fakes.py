"""Doubles for the seams between rooms, without weights: a script or a checksum decides their answers."""

from __future__ import annotations

import math
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Final

import torch
from torch import Tensor

from mdi.cluster.delivery import Deliver, GaveUp, Rewired
from mdi.core.batch import Batch, Copy, Result, Token, TokenSampling, Visual
from mdi.core.capabilities import Capabilities
from mdi.core.constraint import Constraint
from mdi.core.errors import LinkError, MDIError
from mdi.core.histogram import Distribution
from mdi.core.messages import Conversation, Message, PromptInput, RawText, TokenIds, parse_messages
from mdi.core.sampling import SamplingParams
from mdi.core.status import CacheLayout, CacheStatus, Load, Measurements, PlanStatus, StageStatus
from mdi.core.template_settings import TemplateSettings
from mdi.engine import FinishReason, NodeStatus, Piece, RecoveryStatus, Stream
from mdi.models.config import StageSpec

Prompt = str | RawText | TokenIds | tuple[Message, ...]


class Hold:
    """A step of a script that waits for `FakeRequest.resume`."""


HOLD: Final = Hold()
Step = Piece | MDIError | Hold
Script = Callable[[Prompt, SamplingParams], Iterable[Step]]


def piece(text: str, finish: FinishReason | None = None, *, index: int = 0) -> Piece:
    """A piece of one token."""
    return Piece(index, text, (Token(1, 0.0),), finish)


def echo(prompt: Prompt, params: SamplingParams) -> Iterable[Step]:
    """Every sample is the prompt, in two pieces; the samples alternate."""
    text = prompt.text if isinstance(prompt, RawText) else prompt if isinstance(prompt, str) else "ok"
    yield from (piece(text, index=index) for index in range(params.n))
    yield from (piece(f" #{index}", "stop", index=index) for index in range(params.n))


class FakeRequest:
    """A scripted request: puts its steps into a real `Stream` and records whether it was cancelled before its end."""

    def __init__(self, steps: Iterable[Step], prompt_token_ids: tuple[int, ...] = ()) -> None:
        self.stream = Stream(self._cancel)
        self.stream.prompt_token_ids = prompt_token_ids
        self.cancelled = threading.Event()
        self._steps = deque(steps)
        self._lock = threading.RLock()
        self.ended = False
        self.resume()

    def resume(self) -> None:
        """Continues to the next HOLD, error, or end. From any thread."""
        with self._lock:
            while self._steps and not self.ended:
                step = self._steps.popleft()
                if isinstance(step, Hold):
                    return
                self.ended = isinstance(step, MDIError)
                if isinstance(step, Piece):
                    self._note(step)
                self.stream.put(step)
            self._end()

    def _note(self, step: Piece) -> None:
        """The times of an engine that schedules a request just before its first token."""
        if self.stream.timing.first_token_s is None:
            self.stream.reached("scheduled_s")
            self.stream.reached("first_token_s")
        if step.finish_reason:
            self.stream.reached("last_token_s")

    def _cancel(self) -> None:
        with self._lock:
            if not self.ended:
                self.cancelled.set()
                self._end()

    def _end(self) -> None:
        if not self.ended:
            self.ended = True
            self.stream.put(None)


@dataclass(frozen=True)
class Call:
    """The arguments of one `submit`."""

    prompt: Prompt
    params: SamplingParams
    min_pixels: int | None
    max_pixels: int | None
    conversation: Conversation | None = None
    constraint: Constraint | None = None

    @property
    def settings(self) -> TemplateSettings:
        """For the chat template."""
        return self.conversation.settings if self.conversation else {}


class FakeEngine:
    """An engine for the gateway: `script` gives the steps of a request, `refuse` an error for `submit` to raise."""

    def __init__(self) -> None:
        self.model_name = "fake"
        self.model_names: tuple[str, ...] = ("fake",)
        self.reset()

    def reset(self) -> None:
        """Restores the first state: echoes, refuses nothing, has no calls."""
        self.capabilities = Capabilities(max_model_len=512, modalities=("text", "image", "video"), tool_syntax="hermes")
        self.error: MDIError | None = None
        self.cache = CacheStatus(used_share=0.0, preemptions=0)
        self.recovery = RecoveryStatus(recovering=False, recoveries=0, failed_requests=0)
        self.cache_layout = CacheLayout(16, 64, "float32", max_sequences=4, sequence_length=512)
        nothing = Distribution((1.0,), (0, 0), 0.0)
        self.measurements = Measurements(nothing, nothing, nothing, 0, media_queries=0, media_hits=0)
        self.statuses = [
            NodeStatus("starter", "ready", 0, 2, "float32", "cpu", 1000, 7, 0.5, 20, 10, node="starter", group=0)
        ]
        self.plan = PlanStatus(2, "one node has the whole model", (StageStatus("starter", 0, 2, ("head",), 1.0),))
        self.answer_ready: Callable[[], bool] = lambda: True
        self.opens_thought = False
        self.script: Script = echo
        self.refuse: Callable[[Prompt], Exception | None] = lambda _: None
        self.calls: list[Call] = []
        self.requests: list[FakeRequest] = []
        self.submitted = threading.Event()

    def says(self, *steps: Step) -> None:
        """Gives every request these steps."""
        self.script = lambda _prompt, _params: steps

    def submit(
        self,
        prompt: PromptInput,
        params: SamplingParams | None = None,
        *,
        constraint: Constraint | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> Stream:
        return self._begin(prompt, params or SamplingParams(), min_pixels, max_pixels, self.script, constraint)

    def prepare(self, prompt: PromptInput, *, min_pixels: int | None = None, max_pixels: int | None = None) -> Stream:
        return self._begin(prompt, SamplingParams(), min_pixels, max_pixels, lambda *_: ())

    def _begin(
        self,
        prompt: PromptInput,
        params: SamplingParams,
        min_pixels: int | None,
        max_pixels: int | None,
        script: Script,
        constraint: Constraint | None = None,
    ) -> Stream:
        conversation = prompt if isinstance(prompt, Conversation) else None
        if isinstance(prompt, Conversation):
            prompt = prompt.messages
        read = prompt if isinstance(prompt, (str, RawText, TokenIds)) else parse_messages(prompt)
        if error := self.refuse(read):
            raise error
        self.calls.append(Call(read, params, min_pixels, max_pixels, conversation, constraint))
        ids = read.ids if isinstance(read, TokenIds) else tuple(range(7))
        request = FakeRequest(script(read, params), ids)
        request.stream.opens_thought = self.opens_thought
        self.requests.append(request)
        self.submitted.set()
        return request.stream

    def detokenize(self, token_ids: Sequence[int]) -> str:
        return b"".join(map(self.token_bytes, token_ids)).decode()

    @property
    def load(self) -> Load:
        return Load(running=sum(not request.ended for request in self.requests), waiting=0)

    def nodes(self) -> list[NodeStatus]:
        return self.statuses

    def ready(self, timeout_s: float) -> bool:
        return self.answer_ready()

    def token_bytes(self, token_id: int, *, skip_special_tokens: bool = False) -> bytes:
        return b"<%d>" % token_id

    def part(self, number: int) -> Any:
        """A content part of the last call's last message."""
        messages = self.calls[-1].prompt
        assert isinstance(messages, tuple)
        return messages[-1].content[number]


class FakeStage:
    """A first stage whose hidden states are the token ids, or the media's embeddings: float64 [tokens, 1]."""

    spec = StageSpec(0, 1)

    def working(self, work: str) -> AbstractContextManager[None]:
        return nullcontext()

    def embed(self, token_ids: Tensor, visuals: Sequence[Visual] = ()) -> Tensor:
        hidden = token_ids.double()[:, None]
        for visual in visuals:
            hidden[visual.row : visual.row + len(visual.embeddings)] = visual.embeddings
        return hidden

    def run(self, batch: Batch, hidden: Tensor) -> Tensor:
        return hidden

    def encode_steps(self, rows: Tensor, grid: tuple[int, int, int]) -> Generator[None, None, Tensor]:
        """Three steps; every four patches give the sum of their rows."""
        for _ in range(3):
            yield
        return rows.double().view(-1, 4 * rows.shape[1]).sum(1, keepdim=True)


class FakeLink:
    """A link to nodes whose tokens depend on everything in a slot's cache, and which a test can lose.

    breaks: after how many more batches they are lost; used up one at a time. late: results of batches computed before
    a loss arrive after it. stays_away: `recover` is answered when the test says `come_back` or `give_up`.
    """

    def __init__(
        self, deliver: Deliver, breaks: Iterable[int] = (), *, late: bool = False, stays_away: bool = False
    ) -> None:
        self.asked_to_recover = threading.Event()
        self.computed = 0  # tokens
        self.swallows = False  # batches: nothing comes back, and nobody notices
        self._deliver = deliver
        self._breaks = deque(breaks)
        self._late = late
        self._stays_away = stays_away
        self._caches: dict[int, list[tuple[float, ...]]] = {}
        self._epoch = 1
        self._away = False
        self._sent: queue.SimpleQueue[tuple[int, Batch, Tensor] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def send(self, batch: Batch, hidden: Tensor) -> None:
        self._sent.put((self._epoch, batch, hidden))

    def lost(self, error: LinkError) -> None:
        self._away = True
        self._deliver(error)

    def recover(self) -> None:
        assert self._away
        self.asked_to_recover.set()
        if not self._stays_away:
            self.come_back()

    def lose(self) -> None:
        """Loses a node now."""
        self._away = True
        self._deliver(LinkError("node secondary0 ended", "secondary0"))

    def come_back(self) -> None:
        self._caches = {}
        self._epoch += 1
        self._away = self.swallows = False
        self._deliver(Rewired())

    def give_up(self) -> None:
        self._deliver(GaveUp(LinkError("node secondary0 was lost too often", "secondary0")))

    def close(self) -> None:
        self._sent.put(None)
        self._thread.join()

    def _run(self) -> None:
        served = 0
        while (item := self._sent.get()) is not None:
            epoch, batch, hidden = item
            if epoch != self._epoch or self._away or self.swallows:
                continue
            result = self._compute(batch, hidden)
            if isinstance(result, GaveUp):
                self._deliver(result)
            elif self._breaks and served >= self._breaks[0]:
                self._breaks.popleft()
                served = 0
                self.lose()
                if self._late:
                    self._deliver(result)
            else:
                served += 1
                self._deliver(result)

    def _compute(self, batch: Batch, hidden: Tensor) -> Result | GaveUp:
        tokens, first = [], 0
        for edit in batch.edits:
            if isinstance(edit, Copy):
                self._caches[edit.target] = self._caches[edit.source][: edit.length]
            else:
                del self._caches.setdefault(edit.slot, [])[edit.kept :]
        for part in batch.slices:
            cache = self._caches.setdefault(part.slot, [])
            if part.start > len(cache):
                return GaveUp(LinkError("a batch attends to what was never computed"))
            rows = torch.cat((hidden, batch.positions.T.double()), dim=1)[first : first + part.length]
            cache[part.start :] = map(tuple, rows.tolist())
            first += part.length
            self.computed += part.length
            tokens += [_drawn(cache, sampling) for sampling in part.samplings]
        return Result(batch.id, tuple(tokens))


def _drawn(cache: list[tuple[float, ...]], draw: TokenSampling) -> Token:
    """A small letter of the allowed ones, decided by everything computed so far, and by chance unless greedy.

    Chance is seed, sample and position. A bias that forces a token decides alone.
    """
    if draw.adjustment and math.inf in draw.adjustment.biases:
        return Token(draw.adjustment.biased_ids[0], -1.0)
    chance = (draw.seed, draw.sample, draw.position) if draw.temperature else ()
    mask = draw.token_mask
    letters = [token for token in range(97, 123) if mask is None or mask[token // 8] >> token % 8 & 1]
    return Token(letters[sha256(repr((cache, chance)).encode()).digest()[0] % len(letters)], -1.0)
