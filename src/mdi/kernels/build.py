"""Builds the library of kernels: `python -m mdi.kernels.build`. Standard library only: build tools run it alone.

Every source is compiled once for each instruction set of the architecture, the SHARED ones once. So a library runs on
any CPU of its architecture: only what `cpu.c` finds is called.
"""

from __future__ import annotations

import functools
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
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = HERE / "c"
LIBRARY = HERE / "libmdi_kernels.so"
SHARED = ("cpu.c", "memory.c", "pool.c")
# No contraction: a product and a sum are one operation only where a kernel says so, whatever the compiler.
FLAGS = ("-std=gnu11", "-O2", "-fPIC", "-pthread", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra")
LINKED = ("-shared", "-pthread", "-s", "-O2")  # ziglang then links its release runtime: 6 s, not 32, the first time
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni")
INSTRUCTION_SETS: Mapping[str, Mapping[str, tuple[str, ...]]] = {  # by architecture, from the slowest to the fastest
    "x86_64": {
        "scalar": (),
        "avx2": AVX2,
        "avx2vnni": (*AVX2, "-mavxvnni"),
        "avx512": AVX512,
        "avx512bf16": (*AVX512, "-mavx512bf16"),
        "amx": (*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-mamx-int8"),
    },
    "aarch64": {
        "scalar": (),
        "neon": ("-march=armv8.2-a+dotprod",),
        "neonbf16": ("-march=armv8.2-a+dotprod+i8mm+bf16",),
    },
}
USES = "#include <math.h>\n#include <pthread.h>\nint main(void) { return 0; }\n"  # needs the system's headers


class BuildError(Exception):
    """The library cannot be built: no compiler, or one that fails."""


@dataclass(frozen=True)
class Target:
    """The machines that a library is built for. zig: its name for them, with the oldest system that is supported."""

    architecture: str
    system: str
    zig: str | None = None
    wheel_platform: str | None = None  # the last part of a wheel's name

    @property
    def instruction_sets(self) -> Mapping[str, tuple[str, ...]]:
        """Instruction sets with their compiler flags; an architecture that is not listed has the scalar one."""
        return INSTRUCTION_SETS.get(self.architecture, {"scalar": ()})


RELEASES = (
    Target("x86_64", "linux", "x86_64-linux-gnu.2.17", "manylinux_2_17_x86_64"),
    Target("aarch64", "linux", "aarch64-linux-gnu.2.17", "manylinux_2_17_aarch64"),
    Target("aarch64", "darwin", "aarch64-macos.11.0", "macosx_11_0_arm64"),
)


def this_machine() -> Target:
    architecture = "aarch64" if platform.machine() == "arm64" else platform.machine()
    known = (target for target in RELEASES if (target.architecture, target.system) == (architecture, sys.platform))
    return next(known, Target(architecture, sys.platform))


def build(library: Path = LIBRARY, target: Target | None = None, compiler: list[str] | None = None) -> Path:
    """Builds `library` unless it is there, of these sources and undamaged. Returns its path. Raises BuildError.

    target: this machine by default. compiler: the first words of its command; found by default.
    """
    target = target or this_machine()
    if is_intact(library) and digest(target).encode() in library.read_bytes():
        return library
    compiler = compiler or find_compiler(target)
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder, library.name)
        objects = compile_all(compiler, target, Path(folder))
        run([*compiler, *LINKED, "-o", str(built), *map(str, objects), "-lm"])
        replace(checksum_file(library), checksum(built).encode())
        replace(library, built.read_bytes())
    return library


def is_intact(library: Path) -> bool:
    """Whether a library is there and whole, by its checksum file. The system's loader may crash on a part of one."""
    try:
        return checksum_file(library).read_text() == checksum(library)
    except OSError:
        return False


def checksum_file(library: Path) -> Path:
    return library.with_name(f"{library.name}.sha256")


def checksum(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def digest(target: Target) -> str:
    """Identifies the sources, how they are built, and for which machines."""
    files = [Path(__file__), *sorted(SOURCES.glob("*.[ch]"))]
    parts = [file.read_bytes() for file in files] + [target.architecture.encode(), target.system.encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def find_compiler(target: Target) -> list[str]:
    """The C compiler as the first words of a command: the system's for this machine if it works, or ziglang's."""
    if target == this_machine() and (found := system_compiler()):
        return found
    if importlib.util.find_spec("ziglang") and target.zig:
        return [*zig(), "-target", target.zig]
    raise BuildError("no C compiler that works: install gcc or clang, or `pip install ziglang`, or set CC")


@functools.cache
def system_compiler() -> list[str] | None:
    """CC, or the first of cc, gcc and clang that compiles."""
    commands = [shlex.split(os.environ["CC"])] if os.environ.get("CC") else [["cc"], ["gcc"], ["clang"]]
    return next((command for command in commands if shutil.which(command[0]) and compiles(command, USES)), None)


def zig() -> list[str]:
    return [sys.executable, "-m", "ziglang", "cc"]


def compiles(compiler: list[str], program: str = "", flags: Iterable[str] = ()) -> bool:
    """Whether the compiler takes a program and flags."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "program.c")
        source.write_text(program)
        command = [*compiler, *flags, "-c", str(source), "-o", str(source.with_suffix(".o"))]
        return subprocess.run(command, capture_output=True).returncode == 0


def compile_all(compiler: list[str], target: Target, folder: Path) -> list[Path]:
    """Compiles every source into `folder`, on all cores, for the instruction sets that the compiler knows."""
    named = {isa: known_flags(compiler, flags) for isa, flags in target.instruction_sets.items()}
    sets = {isa: flags for isa, flags in named.items() if compiles(compiler, flags=flags)}
    about = folder / "about.c"
    about.write_text(
        f'const char *mdi_sources(void) {{ return "{digest(target)}"; }}\n'
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


def known_flags(compiler: list[str], flags: tuple[str, ...]) -> tuple[str, ...]:
    """Flags as the compiler names them: zig has CPUs and their features only."""
    if "ziglang" not in compiler:
        return flags
    return tuple(flag.replace("-march=armv8.2-a", "-mcpu=generic+v8_2a") for flag in flags)


def compile_one(compiler: list[str], source: Path, result: Path, flags: Iterable[str]) -> None:
    run([*compiler, *FLAGS, *flags, f"-I{SOURCES}", "-c", str(source), "-o", str(result)])


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{shlex.join(command)}:\n{done.stderr}")
    sys.stderr.write(done.stderr)


def replace(file: Path, content: bytes) -> None:
    """Writes a file that running processes may have open; they keep the old one."""
    partial = file.with_name(f"{file.name}.{os.getpid()}")
    partial.write_bytes(content)
    partial.replace(file)


if __name__ == "__main__":
    try:
        print(build())  # noqa: T201
    except (BuildError, OSError) as error:
        sys.exit(f"error: {error}")
