"""What the gateway needs of an engine: `mdi.Engine` provides it, and so does the double of the tests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from mdi.core.batch import Token
from mdi.core.capabilities import Capabilities
from mdi.core.constraint import Constraint
from mdi.core.errors import MDIError
from mdi.core.messages import PromptInput
from mdi.core.outputs import Piece, Timing, Usage
from mdi.core.sampling import SamplingParams
from mdi.core.status import CacheLayout, CacheStatus, Load, Measurements, NodeStatus, PlanStatus, RecoveryStatus


class Running(Protocol):
    """A running request: `mdi.engine.Stream`, or several of them as one."""

    @property
    def usage(self) -> Usage: ...
    @property
    def timing(self) -> Timing: ...
    def __aiter__(self) -> AsyncIterator[Piece]: ...
    def cancel(self) -> None: ...


class Submitted(Running, Protocol):
    """One running request.

    prompt_token_ids: of its prompt; none before its first piece, or its end. opens_thought: from then on, whether the
    prompt ends with the mark that begins thoughts. prompt_logprobs: the prompt's tokens but the first, where the
    request asks for their logprobs.
    """

    @property
    def prompt_token_ids(self) -> tuple[int, ...]: ...
    @property
    def prompt_logprobs(self) -> tuple[Token, ...]: ...
    @property
    def opens_thought(self) -> bool: ...


class TextEngine(Protocol):
    """An engine that takes requests and reports on its nodes."""

    @property
    def model_name(self) -> str: ...
    @property
    def model_names(self) -> tuple[str, ...]: ...
    @property
    def capabilities(self) -> Capabilities: ...
    @property
    def error(self) -> MDIError | None: ...
    @property
    def load(self) -> Load: ...
    @property
    def cache(self) -> CacheStatus: ...
    @property
    def cache_layout(self) -> CacheLayout: ...
    @property
    def measurements(self) -> Measurements: ...
    @property
    def recovery(self) -> RecoveryStatus: ...
    @property
    def plan(self) -> PlanStatus: ...
    def nodes(self) -> list[NodeStatus]: ...
    def ready(self, timeout_s: float) -> bool: ...
    def token_bytes(self, token_id: int, *, skip_special_tokens: bool = False) -> bytes: ...
    def submit(
        self,
        prompt: PromptInput,
        params: SamplingParams | None = None,
        *,
        constraint: Constraint | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> Submitted: ...
    def prepare(
        self, prompt: PromptInput, *, min_pixels: int | None = None, max_pixels: int | None = None
    ) -> Submitted: ...
    def detokenize(self, token_ids: Sequence[int]) -> str: ...
