"""The public surface: `Engine` takes messages and gives text. Composes cluster, prompt builder and step loop."""

from __future__ import annotations

import atexit
import os
import queue
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from mdi.checkpoint.generation import end_ids, generation_defaults
from mdi.checkpoint.hub import locate, names
from mdi.checkpoint.processing import media_specs
from mdi.checkpoint.source import Source, open_source
from mdi.cluster.cluster import Cluster
from mdi.cluster.launchers.manual import Waiting
from mdi.core.capabilities import Capabilities
from mdi.core.config import EngineConfig
from mdi.core.constraint import Constraint
from mdi.core.errors import ClosedError, InputError, MDIError, OverloadedError
from mdi.core.messages import Conversation, PromptInput
from mdi.core.outputs import Completion, Piece
from mdi.core.progress import Progress
from mdi.core.sampling import Sampling, SamplingParams
from mdi.core.status import CacheLayout, CacheStatus, Load, Measurements, NodeStatus, PlanStatus, RecoveryStatus
from mdi.core.tracing import Span
from mdi.engine.embedding_cache import EmbeddingCache
from mdi.engine.grammar import Grammars
from mdi.engine.loop import Cancel, Inbox, StepLoop, Submit
from mdi.engine.preparation import Preparation
from mdi.engine.scheduler import Scheduler
from mdi.engine.sequence import Request
from mdi.engine.sequence import Sequence as RunningSequence
from mdi.engine.stream import Stream
from mdi.engine.vision_queue import VisionQueue
from mdi.prompt.assembly import Prompt
from mdi.prompt.builder import PixelRange, PromptBuilder
from mdi.prompt.tokenizer import Tokenizer
from mdi.prompt.vocabulary import check_vocabulary

READINESS_PROBE = Prompt((0,), torch.zeros(3, 1, dtype=torch.int64), delta=0, media=())  # one token, of any vocabulary
PROBE_POLL_S = 0.01


class Engine:
    """A model, loaded over one or more nodes and ready for requests from any thread.

    model: a checkpoint's folder in Hugging Face layout, its name on the hub, or all settings as an `EngineConfig`.
    settings: by their names in `EngineConfig`: `Engine("bundled", n_nodes=3, dtype="float32")`.
    progress: called with (node, done, total) in bytes while weights load. waiting: called with the nodes that are
    awaited, when they are started on other machines.

    Raises CheckpointError or ConfigError when the model cannot be served that way.
    """

    def __init__(
        self,
        model: str | Path | EngineConfig,
        *,
        progress: Progress | None = None,
        waiting: Waiting | None = None,
        **settings: Any,
    ) -> None:
        config = model if isinstance(model, EngineConfig) else EngineConfig.of(model)
        config = config.with_settings(**settings)
        path = locate(
            config.model.checkpoint,
            ckpt_folder=config.model.ckpt_folder,
            hf_token=config.model.hf_token,
            mmproj=config.model.mmproj,
            progress=progress,
        )
        source = open_source(path, config.model.adapter)
        self.model_names = names(config.model.checkpoint, path)
        self.model_name = self.model_names[0]
        self.max_queue = config.limits.max_queue
        self._defaults = generation_defaults(path, config.model.generation_config)
        self._end_ids = end_ids(source)
        self._vocab_size = source.model_config.vocab_size
        self._tokenizer = Tokenizer(
            path, config.model.chat_template, config.model.tool_call_parser, config.model.reasoning_parser
        )
        check_vocabulary(self._tokenizer.backend, source.model_config)
        self._media_specs = media_specs(source, config.limits.min_pixels, config.limits.max_pixels)
        self._requests: set[Request] = set()
        self._lock = threading.Lock()
        self._closed = False
        self._inbox: Inbox = queue.SimpleQueue()
        self._cluster = Cluster(source, config, self._inbox.put, progress, waiting)
        self.sequence_length = self._cluster.cache.sequence_length
        try:
            self._prompts = self._prompt_builder(source, config)
            self._counting = self._prompts.counting()
        except BaseException:
            self._cluster.close()
            raise
        self.capabilities = Capabilities(
            self.sequence_length,
            ("text", "image", "video") if source.model_config.vision else ("text",),
            self._tokenizer.tool_syntax,
            self._tokenizer.reasoning,
            self._tokenizer.special_marks,
        )
        self._loop = self._start_loop(config)
        grammars = Grammars(self._tokenizer, self._end_ids, self._vocab_size)
        self._preparation = Preparation(grammars, self._start, self._end)
        atexit.register(self._close_in, os.getpid())  # threads that still compute crash a process while Python ends

    def submit(
        self,
        prompt: PromptInput,
        params: SamplingParams | None = None,
        *,
        constraint: Constraint | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> Stream:
        """Starts a request and returns its stream of pieces.

        prompt: messages in the chat form, a plain string (one user message where the model has a chat template),
        `RawText` or `TokenIds`. constraint: what the answers must look like. Raises InputError for malformed messages
        and unknown ids, OverloadedError when the queue is full, LinkError when a node is lost; the stream raises later
        errors (constraint, media, lengths).
        """
        return self._begin(
            prompt, params or SamplingParams(), PixelRange(min_pixels, max_pixels), constraint=constraint
        )

    def prepare(self, prompt: PromptInput, *, min_pixels: int | None = None, max_pixels: int | None = None) -> Stream:
        """Makes the prompt of a request and computes nothing: a stream without pieces, which then has its token ids.

        Images and videos are fetched and decoded for the number of their tokens. The prompt may be longer than the
        sequence length, see `PromptBuilder.counting`. Raises what `submit` does.
        """
        return self._begin(prompt, SamplingParams(), PixelRange(min_pixels, max_pixels), computes=False)

    def tokenize(self, prompt: PromptInput, **pixels: int) -> tuple[int, ...]:
        """The token ids that a request of this prompt has. See `prepare`."""
        stream = self.prepare(prompt, **pixels)
        stream.completion()
        return stream.prompt_token_ids

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """The text of these tokens, special ones by their names. Raises InputError for ids that the model lacks."""
        self._check_vocabulary("tokens", token_ids)
        return self._tokenizer.decode(token_ids)

    def chat(self, prompt: PromptInput, params: SamplingParams | None = None, **settings: Any) -> Completion:
        """Runs a request to its end. See `submit`."""
        return self.submit(prompt, params, **settings).completion()

    def stream(self, prompt: PromptInput, params: SamplingParams | None = None, **settings: Any) -> Iterator[Piece]:
        """Runs a request, piece by piece; leaving the iteration cancels it. See `submit`."""
        stream = self.submit(prompt, params, **settings)
        try:
            yield from stream
        finally:
            stream.cancel()

    def token_bytes(self, token_id: int, *, skip_special_tokens: bool = False) -> bytes:
        """The bytes of a token: part of a text in UTF-8, not always whole characters.

        skip_special_tokens: none for special tokens, as in a text without them.
        """
        return self._tokenizer.token_bytes(token_id, skip_special_tokens=skip_special_tokens)

    def nodes(self) -> list[NodeStatus]:
        """The last known status of every node, in pipeline order."""
        return self._cluster.nodes()

    @property
    def plan(self) -> PlanStatus:
        """Which node has which layers, and why."""
        return self._cluster.plan

    def spans(self, record: bool) -> dict[str, list[Span]]:
        """Spans of work of every node since the last call, by its name. record: whether to note more from now on.

        Raises LinkError when a node does not answer.
        """
        return self._cluster.spans(record)

    def ready(self, timeout_s: float) -> bool:
        """Whether a token comes through all nodes within this time: of a running request, or of a probe.

        False at once while lost nodes are brought back, and after an error or `close`.
        """
        before, deadline = self._loop.results, time.monotonic() + timeout_s
        stream = Stream(lambda: self._cancel(probe))
        sampling = SamplingParams(temperature=0, max_tokens=1).resolved(self._defaults, self.sequence_length)
        probe = Request(stream, sampling)
        self._start(probe, READINESS_PROBE)
        while self._loop.results == before:
            if self._closed or self.error or self.recovery.recovering or time.monotonic() > deadline:
                stream.cancel()
                return False
            time.sleep(PROBE_POLL_S)
        return True

    @property
    def load(self) -> Load:
        """How many requests are being computed, and how many wait."""
        with self._lock:
            requests = list(self._requests)
        running = sum(any(sequence.slot is not None for sequence in list(request.sequences)) for request in requests)
        return Load(running, len(requests) - running)

    @property
    def cache(self) -> CacheStatus:
        """How full the KV cache is, and how often that cost a sequence its place."""
        return self._loop.cache

    @property
    def cache_layout(self) -> CacheLayout:
        """What the KV cache has memory for."""
        return self._cluster.cache_layout

    @property
    def measurements(self) -> Measurements:
        """Sizes of batches and times of encodings and recoveries, of all so far."""
        return self._loop.measurements

    @property
    def recovery(self) -> RecoveryStatus:
        """Whether nodes are being brought back, how often that happened, and how many requests failed by it."""
        return self._loop.recovery

    @property
    def error(self) -> MDIError | None:
        """The error that ended service for good; None while requests are served."""
        return self._loop.error

    def close(self) -> None:
        """Ends running requests with ClosedError, and ends every node. Safe to call twice; called when Python ends."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        atexit.unregister(self._close_in)
        self._preparation.close()
        self._loop.close()
        self._cluster.close()
        with self._lock:
            left = list(self._requests)
        for request in left:
            request.stream.put(ClosedError("the engine was closed"))

    def _close_in(self, process: int) -> None:
        """A forked copy of the process has none of the engine's threads, and the nodes are not its own."""
        if os.getpid() == process:
            self.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _prompt_builder(self, source: Source, config: EngineConfig) -> PromptBuilder:
        (images, videos), recorder = self._media_specs, self._cluster.stage.recorder
        return PromptBuilder(
            source.model_config,
            self._tokenizer,
            images,
            config.media,
            self.sequence_length,
            videos,
            recorder,
            self._cluster.cache.remedy,
        )

    def _start_loop(self, config: EngineConfig) -> StepLoop:
        cluster = self._cluster
        scheduler: Scheduler[RunningSequence] = Scheduler(
            n_slots=cluster.cache.n_slots,
            cache_tokens=cluster.cache.tokens,
            token_budget=config.cache.batch_tokens,
            max_in_flight=cluster.n_stages,
        )
        embeddings = EmbeddingCache(config.cache.vision_cache_bytes)
        vision = VisionQueue(cluster.stage, embeddings, cluster.encoder, self._inbox.put)
        return StepLoop(cluster.stage, cluster.link, self._inbox, scheduler, vision, self._ended)

    def _check_token_ids(self, sampling: Sampling) -> None:
        """Raises InputError for ids beyond the vocabulary: the finisher indexes logits with them."""
        for field, ids in (("logit_bias", sampling.logit_bias), ("stop_token_ids", sampling.stop_token_ids)):
            self._check_vocabulary(field, ids)

    def _check_vocabulary(self, field: str, ids: Iterable[int]) -> None:
        if unknown := [token_id for token_id in ids if not 0 <= token_id < self._vocab_size]:
            raise InputError(f"{field}: the model has {self._vocab_size} tokens, and no token {unknown[0]}", field)

    def _begin(
        self,
        prompt: PromptInput,
        params: SamplingParams,
        pixels: PixelRange,
        *,
        constraint: Constraint | None = None,
        computes: bool = True,
    ) -> Stream:
        prompts = self._prompts if computes else self._counting
        checked = prompts.check(prompt)
        sampling = params.resolved(self._defaults, self.sequence_length)
        self._check_token_ids(sampling)
        stream = Stream(lambda: self._cancel(request))
        work = self._preparation.work()
        names = prompt.marks if isinstance(prompt, Conversation) else ()
        marks = frozenset(self._tokenizer.special_marks.get(name, -1) for name in names)
        request = Request(stream, sampling, constraint=constraint, marks=marks, computes=computes, work=work)
        self._accept(request)
        self._preparation.begin(request, prompts, checked, pixels)
        return stream

    def _accept(self, request: Request) -> None:
        with self._lock:
            if self._closed:
                raise ClosedError("the engine is closed")
            if self._loop.error:
                raise self._loop.error
            if len(self._requests) >= self.max_queue:
                raise OverloadedError(f"{self.max_queue} requests are running or waiting already: try again later")
            self._requests.add(request)

    def _ended(self, request: Request) -> None:
        request.work.release()
        with self._lock:
            self._requests.discard(request)

    def _cancel(self, request: Request) -> None:
        request.work.cancel()
        self._inbox.put(Cancel(request))

    def _start(self, request: Request, prompt: Prompt) -> None:
        request.set_prompt(prompt, self._tokenizer.backend, self._end_ids, self.sequence_length)
        if request.computes:
            self._inbox.put(Submit(request))
        else:
            self._end(request, None)

    def _end(self, request: Request, error: MDIError | None) -> None:
        self._ended(request)
        request.stream.put(error)
