"""The library of kernels: found, checked and loaded once a process, with the fastest instruction set of this CPU."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mdi.core.cores import default_threads
from mdi.core.errors import ConfigError, MDIError
from mdi.kernels import build

VARIABLE = "MDI_CPU"
REFERENCE = "scalar"
REMEDY = "run `python -m mdi.kernels.build`"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Library:
    """The loaded library and the instruction set (`isa`) whose kernels are used."""

    isa: str
    path: Path
    code: ctypes.CDLL

    def kernel(self, name: str, *arguments: type[Any], result: type[Any] | None = None) -> Callable[..., Any]:
        """A kernel of the instruction set, declared: `mdi_{isa}_{name}`. The GIL is free while it runs."""
        return declared(self.code, f"mdi_{self.isa}_{name}", arguments, result)

    def shared(self, name: str, *arguments: type[Any], result: type[Any] | None = None) -> Callable[..., Any]:
        """A function that all instruction sets share: `mdi_{name}`."""
        return declared(self.code, f"mdi_{name}", arguments, result)


@functools.cache
def library() -> Library | None:
    """The library of this process; None, with one line in the log, where there is none that works.

    Raises ConfigError if MDI_CPU names an instruction set that is unknown or that this machine cannot run.
    """
    try:
        return load(build.LIBRARY)
    except UnusableError as error:
        log.warning("kernels: %s; torch computes instead, more slowly: %s", error, REMEDY)
        return None


def kernels_in_use(device: str) -> str:
    """What computes on a device: an instruction set of the kernels, or "torch"."""
    loaded = library() if device.startswith("cpu") else None
    return loaded.isa if loaded else "torch"


class UnusableError(MDIError):
    """The library is missing, damaged, or built for another machine or of other sources."""


def load(path: Path) -> Library:
    """Loads the library at `path`. Raises UnusableError and ConfigError."""
    if not path.exists():
        raise UnusableError(f"{path.name} is not built")
    if not build.is_intact(path):
        raise UnusableError(f"{path.name} is damaged")
    try:
        code = ctypes.CDLL(str(path))
    except OSError as error:
        raise UnusableError(f"{path.name} cannot be loaded ({error})") from error
    if text(code, "sources") != build.digest(build.this_machine()):
        raise UnusableError(f"{path.name} was built of other sources")
    declared(code, "mdi_set_threads", (ctypes.c_int,), None)(default_threads())
    return Library(chosen(code), path, code)


def chosen(code: ctypes.CDLL) -> str:
    """The fastest instruction set that this machine runs and whose self-test passes, or the one that MDI_CPU names."""
    runs = declared(code, "mdi_cpu_runs", (ctypes.c_char_p,), ctypes.c_int)
    possible = [isa for isa in text(code, "instruction_sets").split() if runs(isa.encode())]
    if wanted := os.environ.get(VARIABLE):
        if wanted not in possible:
            raise ConfigError(f"{VARIABLE}={wanted}: this machine and library have {', '.join(possible)}")
        if failed := self_test(code, wanted):
            raise ConfigError(f"{VARIABLE}={wanted}: its {failed} fail the self-test on this machine; choose another")
        return wanted
    for isa in reversed(possible):
        failed = self_test(code, isa)
        if not failed:
            return isa
        log.warning("kernels: %s of %s fail their self-test here; a lower instruction set is used", failed, isa)
    raise UnusableError("no instruction set passes its self-test")


def self_test(code: ctypes.CDLL, isa: str) -> str:
    """Which kernels of an instruction set compute something else than the scalar ones; empty if none does."""
    if isa == REFERENCE:
        return ""
    failed: bytes | None = declared(code, f"mdi_{isa}_self_test", (), ctypes.c_char_p)()
    return (failed or b"").decode()


def text(code: ctypes.CDLL, name: str) -> str:
    value: bytes = declared(code, f"mdi_{name}", (), ctypes.c_char_p)()
    return value.decode()


def declared(
    code: ctypes.CDLL, name: str, arguments: tuple[type[Any], ...], result: type[Any] | None
) -> Callable[..., Any]:
    function = getattr(code, name)
    function.argtypes = arguments
    function.restype = result
    return function  # type: ignore[no-any-return]
