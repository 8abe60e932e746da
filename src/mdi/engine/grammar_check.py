"""A process of its own that tries grammars before the engine compiles them: a hostile one may take minutes, or crash.

This file is run as a script, and imports nothing else of ours: the process takes 0.1 s to start, and 25 MB.
"""

from __future__ import annotations

import contextlib
import json
import random
import resource
import selectors
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping

from llguidance import LLMatcher, LLTokenizer

COMPILE_S = 0.3  # CPU time; with the vocabulary of a model instead of 256 bytes, it is up to seven times as much
STEPS = 128
STEPS_S = 0.15  # CPU time of all steps together; those of plain schemas take 0.01
KILL_S = 2  # CPU time after which the kernel ends the process
ANSWER_S = 10.0
MEMORY_BYTES = 2**32
NO_TEXT = "no text follows it"
TOO_COSTLY = "it takes too long to follow: use fewer or shorter alternatives, repetitions and properties"


class GrammarChecker:
    """Starts the process at the first grammar, and again after one that ended it. For one thread at a time.

    special: the names of special tokens, by their ids; a grammar may hold them.
    """

    def __init__(self, vocab_size: int, special: Mapping[int, str]) -> None:
        self._vocabulary = json.dumps([vocab_size, list(special.items())])
        self._process: subprocess.Popen[bytes] | None = None

    def error(self, grammar: str) -> str | None:
        """llguidance's error for a grammar that is malformed, ours for one that is too costly; None for others."""
        process = self._process = self._process or _started(self._vocabulary)
        if not (answer := _answer(process, grammar)):
            self.close()
            return TOO_COSTLY
        error: str | None = json.loads(answer)
        return error

    def close(self) -> None:
        """Ends the process. Safe to call twice."""
        if process := self._process:
            self._process = None
            process.kill()
            process.communicate()


def _started(vocabulary: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-P", __file__, vocabulary]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


class ByteVocabulary:
    """A vocabulary of bytes for llguidance, behind the special tokens of a model, which have their own ids."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, vocab_size: int, special: Iterable[tuple[int, str]]) -> None:
        self.first = vocab_size  # the token of byte 0
        self.eos_token_id = vocab_size + 256
        self.tokens = [b""] * vocab_size + [bytes([byte]) for byte in range(256)] + [b"<end>"]
        for token_id, name in special:
            self.tokens[token_id] = name.encode()
        self.special_token_ids = [*(token_id for token_id, _ in special), self.eos_token_id]
        self.used_ids = [*(token_id for token_id, _ in special), *range(self.first, self.eos_token_id)]

    def __call__(self, text: str) -> list[int]:
        return [self.first + byte for byte in text.encode()]


def _answer(process: subprocess.Popen[bytes], grammar: str) -> bytes:
    """The process's line about a grammar; none where it ends, or takes too long."""
    assert process.stdin
    assert process.stdout
    with contextlib.suppress(BrokenPipeError), selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        process.stdin.write(json.dumps(grammar).encode() + b"\n")
        process.stdin.flush()
        if selector.select(ANSWER_S):
            return process.stdout.readline()
    return b""


def check(grammar: str, vocabulary: ByteVocabulary, tokenizer: LLTokenizer) -> str | None:
    """Compiles a grammar, and goes through some texts that it allows. See `GrammarChecker.error`."""
    chance, started_s = random.Random(0), time.process_time()  # noqa: S311
    start = LLMatcher(tokenizer, grammar, log_level=0)
    if start.is_error():
        return start.get_error()
    if time.process_time() - started_s > COMPILE_S:
        return TOO_COSTLY
    matcher, started_s = start.deep_copy(), time.process_time()
    for _ in range(STEPS):
        mask = matcher.compute_bitmask()
        allowed = [token_id for token_id in vocabulary.used_ids if mask[token_id // 8] >> token_id % 8 & 1]
        if allowed:
            matcher.consume_token(chance.choice(allowed))
        if matcher.is_error():
            return NO_TEXT if matcher.get_error().startswith("NoExtension") else TOO_COSTLY
        if time.process_time() - started_s > STEPS_S:
            return TOO_COSTLY
        if matcher.is_stopped() or not allowed:
            matcher = start.deep_copy()
    return None


def main() -> None:
    """Answers one grammar a line. Ends with its standard input, and where a grammar takes too much."""
    vocabulary = ByteVocabulary(*json.loads(sys.argv[1]))
    tokenizer = LLTokenizer(vocabulary, slices=[])  # type: ignore[arg-type]
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":  # elsewhere it counts what is reserved as well
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    for line in sys.stdin:
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + KILL_S, hard))
        sys.stdout.write(json.dumps(check(json.loads(line), vocabulary, tokenizer)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
