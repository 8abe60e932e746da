"""Builds the library of kernels: `python -m mdi.kernels.build`. Standard library only: build tools run it alone.

Every source is compiled once for each instruction set of the architecture, the SHARED ones once. So a library runs on
any CPU of its architecture: only what `cpu.c` finds is called.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = HERE / "c"
LIBRARY = HERE / "libmdi_kernels.so"
SHARED = ("cpu.c", "memory.c", "pool.c")
# No contraction: a product and a sum are one operation only where a kernel says so, whatever the compiler.
FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-pthread", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra")
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mavx512bf16")
INSTRUCTION_SETS: Mapping[str, Mapping[str, tuple[str, ...]]] = {  # by architecture, from the slowest to the fastest
    "x86_64": {
        "scalar": (),
        "avx2": AVX2,
        "avx2vnni": (*AVX2, "-mavxvnni"),
        "avx512": AVX512,
        "amx": (*AVX512, "-mamx-tile", "-mamx-int8", "-mamx-bf16"),
    },
    "aarch64": {"scalar": (), "neon": ("-march=armv8.2-a+dotprod",)},
}


class BuildError(Exception):
    """The library cannot be built: no compiler, or one that fails."""


def build(library: Path = LIBRARY) -> Path:
    """Builds `library`, unless it is there and of these sources. Returns its path. Raises BuildError."""
    if library.exists() and digest().encode() in library.read_bytes():
        return library
    compiler = find_compiler()
    with tempfile.TemporaryDirectory() as folder:
        sets = {isa: flags for isa, flags in instruction_sets().items() if knows(compiler, flags)}
        built = Path(folder, library.name)
        objects = compile_all(compiler, sets, Path(folder))
        run([*compiler, "-shared", "-pthread", "-o", str(built), *map(str, objects), "-lm"])
        partial = library.with_name(f"{library.name}.{os.getpid()}")
        shutil.copyfile(built, partial)  # perhaps another disk
        partial.replace(library)  # running processes keep the old one
    return library


def digest() -> str:
    """Identifies the sources and how they are built."""
    files = [Path(__file__), *sorted(SOURCES.glob("*.[ch]"))]
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


def find_compiler() -> list[str]:
    """The C compiler as the first words of a command: CC, the system's, or that of the ziglang package."""
    if chosen := os.environ.get("CC"):
        return shlex.split(chosen)
    for name in ("cc", "gcc", "clang"):
        if path := shutil.which(name):
            return [path]
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "cc"]
    raise BuildError("no C compiler: install gcc or clang, or `pip install ziglang`, or set CC")


def instruction_sets() -> Mapping[str, tuple[str, ...]]:
    """Instruction sets of this architecture with their compiler flags; any other architecture has the scalar one."""
    machine = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    return INSTRUCTION_SETS.get(machine, {"scalar": ()})


def knows(compiler: list[str], flags: Iterable[str]) -> bool:
    """Whether the compiler accepts flags."""
    command = [*compiler, *flags, "-x", "c", "-c", "-o", os.devnull, os.devnull]
    return subprocess.run(command, capture_output=True).returncode == 0


def compile_all(compiler: list[str], sets: Mapping[str, tuple[str, ...]], folder: Path) -> list[Path]:
    """Compiles every source into `folder`, on all cores."""
    about = folder / "about.c"
    about.write_text(
        f'const char *mdi_sources(void) {{ return "{digest()}"; }}\n'
        f'const char *mdi_instruction_sets(void) {{ return "{" ".join(sets)}"; }}\n'
    )
    shared = (about, *(SOURCES / name for name in SHARED))
    jobs: list[tuple[Path, Path, tuple[str, ...]]] = [(source, folder / f"{source.stem}.o", ()) for source in shared]
    for source in sorted(SOURCES.glob("*.c")):
        if source.name in SHARED:
            continue
        for isa, flags in sets.items():
            defines = (f"-DMDI_ISA={isa}", f"-DMDI_{isa.upper()}=1")
            jobs.append((source, folder / f"{source.stem}.{isa}.o", (*defines, *flags)))
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(lambda job: compile_one(compiler, *job), jobs))
    return [result for _, result, _ in jobs]


def compile_one(compiler: list[str], source: Path, result: Path, flags: Iterable[str]) -> None:
    run([*compiler, *FLAGS, *flags, f"-I{SOURCES}", "-c", str(source), "-o", str(result)])


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{shlex.join(command)}:\n{done.stderr}")
    sys.stderr.write(done.stderr)


if __name__ == "__main__":
    try:
        print(build())  # noqa: T201
    except (BuildError, OSError) as error:
        sys.exit(f"error: {error}")
