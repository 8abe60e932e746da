"""A command in a pseudo-terminal of its own: what it shows, and what is typed."""

from __future__ import annotations

import os
import pty
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from testing.processes import ENVIRONMENT


class Terminal:
    """process: the command. Its Ctrl-C is the byte 3, its Ctrl-D the byte 4."""

    def __init__(self, process: subprocess.Popen[bytes], descriptor: int) -> None:
        self.process = process
        self._descriptor = descriptor
        self._unread = ""

    def type(self, text: str) -> None:
        os.write(self._descriptor, text.encode())

    def read_until(self, wanted: str) -> str:
        """What is shown next, up to this and with it."""
        while wanted not in self._unread:
            self._unread += os.read(self._descriptor, 4096).decode(errors="replace")
        before, _, self._unread = self._unread.partition(wanted)
        return before + wanted

    def read_some(self) -> str:
        """What is shown next, a letter or more."""
        shown = self._unread or os.read(self._descriptor, 4096).decode(errors="replace")
        self._unread = ""
        return shown


@contextmanager
def terminal(words: Sequence[str], folder: Path, **environment: str) -> Iterator[Terminal]:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        words,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**ENVIRONMENT, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", **environment},
        cwd=folder,
        start_new_session=True,
        preexec_fn=_take_terminal,
    )
    os.close(theirs)
    try:
        yield Terminal(process, ours)
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def _take_terminal() -> None:
    """Makes standard input the terminal of this session, so that its Ctrl-C is a signal."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
