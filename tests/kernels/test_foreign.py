"""Kernels of other machines: arm64 compiled by a cross compiler, and run by an emulator."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from mdi.kernels import build

PROGRAM = Path(__file__).with_name("foreign.c")
ROOT = "/usr/aarch64-linux-gnu"
CROSS = ["aarch64-linux-gnu-gcc"]  # Debian: gcc-aarch64-linux-gnu, libc6-dev-arm64-cross
EMULATOR = "qemu-aarch64"  # Debian: qemu-user


CAN_EMULATE = shutil.which(CROSS[0]) and shutil.which(EMULATOR)


@pytest.mark.slow
@pytest.mark.timeout(380)  # mostly the compiler
@pytest.mark.skipif(not CAN_EMULATE, reason="needs gcc-aarch64-linux-gnu, libc6-dev-arm64-cross and qemu-user")
def test_the_kernels_of_arm64_pass_their_self_test(tmp_path: Path) -> None:
    target = build.Target("aarch64", "linux")
    library = build.build(tmp_path / "libmdi_kernels.so", target, CROSS)
    program = tmp_path / "foreign"
    build.run([*CROSS, "-o", str(program), str(PROGRAM), "-ldl"])
    command = [EMULATOR, "-cpu", "max", "-L", ROOT, str(program), str(library), *target.instruction_sets]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == [f"{isa}: passes" for isa in target.instruction_sets]
    assert not done.returncode, done.stderr
