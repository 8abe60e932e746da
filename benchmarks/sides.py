"""Sides of a comparison: a model in a process of its own, which computes while the others wait.

Ours, transformers and llama.cpp (`benchmarks.llama`) take the same calls. A process of its own keeps one side's threads
and memory from the others.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Self


class Side:
    """A running side. `load_s`: seconds that loading took in it."""

    def __init__(self, module: str, python: Path = Path(sys.executable), **arguments: Any) -> None:
        self._log = TemporaryFile("w+")
        self._process = subprocess.Popen(
            [python, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            bufsize=1,
        )
        self._name = module
        self.load_s: float = self._ask("load", arguments)["seconds"]

    def seconds(self, call: str, **arguments: Any) -> float:
        """Of a call, as the side measures it."""
        return float(self._ask(call, arguments)["seconds"])

    def value(self, call: str, **arguments: Any) -> Any:
        """What a call returns."""
        return self._ask(call, arguments)["value"]

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, call: str, arguments: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([call, arguments]) + "\n")
        answer = self._process.stdout.readline()
        if not answer:
            self._log.seek(0)
            raise RuntimeError(f"{self._name} ended in {call}:\n{self._log.read()[-4000:]}")
        return json.loads(answer)  # type: ignore[no-any-return]
