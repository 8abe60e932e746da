"""A supervisor that does with a unit what systemd does: starts its command, starts it again when it ends, and stops it.

Its processes are found by a variable in their environment, as systemd finds them by their control group.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Mapping
from pathlib import Path

import psutil

from testing.units import UnitFile

MARK = "MDI_SERVICE"


class Service:
    """One unit. log: standard output and error of all its lives. environment: beside what the unit says."""

    def __init__(self, name: str, unit: UnitFile, environment: Mapping[str, str], log: Path) -> None:
        self.name = name
        self.exits: list[int] = []
        self._unit = unit
        self._mark = f"{name}-{os.getpid()}"
        self._environment = {**environment, **unit.environment, MARK: self._mark}
        self._log = log
        self._wanted = threading.Event()
        self._stopping = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None

    @property
    def processes(self) -> list[psutil.Process]:
        """All that run now, by whoever they were started."""
        return [process for process in psutil.process_iter() if self._is_ours(process)]

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def start(self) -> None:
        assert self._thread is None, f"{self.name} runs"
        self._stopping.clear()
        self._thread = threading.Thread(target=self._run, name=f"supervise-{self.name}")
        self._thread.start()

    def kill(self) -> None:
        """SIGKILL to everything, as a power cut or the kernel's end of memory; it is started again."""
        for process in self.processes:
            process.kill()

    def stop(self) -> int:
        """SIGTERM to the main process; the rest is killed once it has ended. The last exit status."""
        assert self._thread
        self._stopping.set()
        if self._process:
            self._process.send_signal(signal.SIGTERM)
        self._thread.join()
        self._thread = None
        return self.exits[-1]

    def end(self) -> None:
        """Stops it if it runs, and kills what is left."""
        if self._thread:
            self.stop()
        self.kill()

    def _run(self) -> None:
        while not self._stopping.is_set():
            with self._log.open("ab") as log:
                self._process = subprocess.Popen(
                    self._unit.command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=self._environment,
                    start_new_session=True,
                )
            if self._stopping.is_set():  # told while it was started
                self._process.send_signal(signal.SIGTERM)
            self.exits.append(self._end())
            self.kill()
            self._stopping.wait(float(self._unit.one("RestartSec")))

    def _end(self) -> int:
        """Waits for the end of the main process, once it is told to for so long as the unit says."""
        assert self._process
        while self._process.poll() is None and not self._stopping.wait(0.1):
            pass
        try:
            return self._process.wait(float(self._unit.one("TimeoutStopSec")))
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get(MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False
