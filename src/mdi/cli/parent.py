"""The end of a node with its parent, watched from before the imports that take seconds. Imports nothing of them."""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import threading
from functools import cache

OPTION = "--with-parent"


@cache
def end_with_parent() -> None:
    """Ends this process when its parent, which holds the other end of standard input, has ended. Safe to call twice.

    Python's threads wait while torch's libraries are loaded, the kernel of Linux does not: it kills this process when
    the pipe's other end is closed (fcntl(2), F_SETSIG). A node has nothing to save.
    """
    if sys.platform == "linux":
        fcntl.fcntl(sys.stdin, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(sys.stdin, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(sys.stdin, fcntl.F_SETFL, fcntl.fcntl(sys.stdin, fcntl.F_GETFL) | os.O_ASYNC)
    threading.Thread(target=_end_with_standard_input, daemon=True).start()


def _end_with_standard_input() -> None:
    """Also where the parent had ended before this process could ask for a signal."""
    while os.read(sys.stdin.fileno(), 4096):  # not sys.stdin's own, whose lock Python wants when it ends
        pass
    os._exit(0)
