"""From accepted requests to prompts, beside the step loop: no request waits for the media of another.

Text is tokenised in order of arrival by two threads that do nothing else. A request with media then gets a thread of
its own, which mostly waits for downloads: the queue's limit is the limit of these threads. At most one of them per core
computes at a time, in turns, and all share a limit of memory. See `media.work`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from mdi.core.config import MEBIBYTE
from mdi.core.cores import usable_cores
from mdi.core.errors import ClosedError, MDIError
from mdi.engine.grammar import Grammars
from mdi.engine.sequence import Request
from mdi.media import AbandonedError, Memory, Turns, Work
from mdi.prompt.assembly import Prompt
from mdi.prompt.builder import CheckedPrompt, Draft, PixelRange, PromptBuilder

log = logging.getLogger(__name__)

TOKENISING_THREADS = 2
MEDIA_BYTES = 1024 * MEBIBYTE  # files, decoded pictures and rows of patches that are not encoded yet
CLOSING_S = 2.0  # for media threads to notice that they are cancelled


class Preparation:
    """Tokenises requests, and fetches and decodes their media.

    ready: called with a request and its prompt. refused: called with a request and the error that ended it, or None
    when its caller has left. Both are called in threads of this object.
    """

    def __init__(
        self,
        grammars: Grammars,
        ready: Callable[[Request, Prompt], None],
        refused: Callable[[Request, MDIError | None], None],
    ) -> None:
        self._grammars = grammars
        self._ready = ready
        self._refused = refused
        self._turns = Turns(usable_cores())
        self._memory = Memory(MEDIA_BYTES)
        self._tokenising = ThreadPoolExecutor(TOKENISING_THREADS, thread_name_prefix="mdi-tokenise")
        self._compiling = ThreadPoolExecutor(1, thread_name_prefix="mdi-grammar")
        self._media_threads: dict[threading.Thread, Work] = {}
        self._closed = False

    def work(self) -> Work:
        """A new request's share."""
        return Work(self._turns, self._memory)

    def begin(self, request: Request, prompts: PromptBuilder, prompt: CheckedPrompt, pixels: PixelRange) -> None:
        """Starts to prepare a request whose messages are checked."""

        def tokenise() -> None:
            self._tokenising.submit(self._attempt, request, lambda: self._tokenise(request, prompts, prompt, pixels))

        if request.constraint:
            self._compiling.submit(self._attempt, request, lambda: self._compile(request, tokenise))
        else:
            tokenise()

    def close(self) -> None:
        """Drops what waits, and ends what runs with ClosedError."""
        self._closed = True
        self._compiling.shutdown(cancel_futures=True)
        self._grammars.close()
        self._tokenising.shutdown(cancel_futures=True)
        threads = dict(self._media_threads)
        for work in threads.values():
            work.cancel()
        for thread in threads:
            thread.join(CLOSING_S)

    def _compile(self, request: Request, then: Callable[[], None]) -> None:
        request.work.check()
        assert request.constraint
        request.rule = self._grammars.rule(request.constraint)
        then()

    def _tokenise(self, request: Request, prompts: PromptBuilder, prompt: CheckedPrompt, pixels: PixelRange) -> None:
        request.work.check()
        draft = prompts.tokenise(prompt, pixels)
        if not draft.media:
            self._complete(request, prompts, draft)
            return
        threading.Thread(target=self._load, args=(request, prompts, draft), name="mdi-media", daemon=True).start()

    def _load(self, request: Request, prompts: PromptBuilder, draft: Draft) -> None:
        self._media_threads[threading.current_thread()] = request.work
        try:
            self._attempt(request, lambda: self._complete(request, prompts, draft))
        finally:
            del self._media_threads[threading.current_thread()]

    def _complete(self, request: Request, prompts: PromptBuilder, draft: Draft) -> None:
        self._ready(request, prompts.complete(draft, request.work))

    def _attempt(self, request: Request, step: Callable[[], None]) -> None:
        try:
            step()
        except AbandonedError:
            self._refused(request, ClosedError("the engine was closed") if self._closed else None)
        except MDIError as error:
            self._refused(request, error)
        except Exception:
            log.exception("a prompt could not be prepared")
            self._refused(request, MDIError("the prompt could not be prepared; the server's log has the details"))
