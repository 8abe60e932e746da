"""The end of a side's process: reads calls from standard input, one JSON object a line, and answers each with a line.

Imports nothing of the project, so that a peer's Python can run it, too.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any


def serve(load: Callable[..., Any]) -> None:
    """Calls `load` with the first line's arguments, then methods of what it returned, until the input ends.

    Every answer is {"seconds": time of the call, "value": what it returned}.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not get between the answers
    side: Any = None
    for line in sys.stdin:
        name, arguments = json.loads(line)
        call = load if side is None else getattr(side, name)
        started_s = time.perf_counter()
        value = call(**arguments)
        seconds = time.perf_counter() - started_s
        side, value = (value, None) if side is None else (side, value)
        print(json.dumps({"seconds": seconds, "value": value}), file=answers, flush=True)
    if hasattr(side, "close"):
        side.close()
