"""Products under AddressSanitizer and UBSan, on random shapes at the edges of panels, groups and tiles of rows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mdi.kernels import build

KERNELS = ("products.c", "pack.c", "pool.c", "memory.c")
SANITIZED = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g")
PROGRAM = """
import ctypes, random, sys
from pathlib import Path
import torch
from mdi.core.quantization import INT4, INT8, INT8_32
from mdi.kernels.library import Library
from mdi.kernels.packed import Kernels, PackedWeight, product
from mdi.layers.quantize import dequantize, quantize

isa, path = sys.argv[1:]
kernels = Kernels.of(Library(isa, Path(path), ctypes.CDLL(path)))
chance = random.Random(0)
torch.manual_seed(0)
for _ in range(60):
    format_ = chance.choice([None, INT8, INT8_32, INT4])
    dtype = chance.choice([torch.float32, torch.bfloat16, torch.float16])
    inputs = chance.randint(1, 200) if format_ is None else chance.randint(1, 5) * 64
    outputs, rows = 2 * chance.randint(1, 70), chance.choice([1, 2, 3, 5, 7, 17, 33])
    swiglu = chance.random() < 0.3
    weight = torch.randn(outputs, inputs)
    stored = weight.to(dtype) if format_ is None else quantize(weight, format_)
    packed = PackedWeight.pack(stored, swiglu=swiglu, kernels=kernels)
    x = torch.randn(rows, inputs, dtype=dtype)
    made = product(packed, x, bias=torch.randn(outputs), residual=torch.randn(rows, packed.width, dtype=dtype))
    assert made.isfinite().all()
print("done")
"""


@pytest.mark.slow  # compiling takes a minute for each
@pytest.mark.parametrize("isa", ["scalar", "avx2"])
def test_products_stay_within_their_memory(isa: str, tmp_path: Path) -> None:
    target = build.this_machine()
    compiler = build.system_compiler()
    if compiler is None or isa not in target.instruction_sets:
        pytest.skip("no compiler of the system's, or another processor")
    preloaded = [_runtime(compiler, name) for name in ("libasan.so", "libubsan.so")]
    library = tmp_path / "sanitized.so"
    sources = [str(build.SOURCES / name) for name in KERNELS]
    flags = [
        *build.FLAGS,
        *SANITIZED,
        "-O1",
        f"-DMDI_ISA={isa}",
        f"-DMDI_{isa.upper()}=1",
        *target.instruction_sets[isa],
    ]
    subprocess.run([*compiler, *flags, "-shared", *sources, "-lm", "-o", str(library)], check=True)
    command = [sys.executable, "-c", PROGRAM, isa, str(library)]
    environment = os.environ | {"LD_PRELOAD": " ".join(preloaded), "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout == "done\n", done.stderr[-3000:]


def _runtime(compiler: list[str], name: str) -> str:
    """Where the compiler has a sanitizer's library."""
    found = subprocess.run([*compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    if not Path(found).is_absolute():
        pytest.skip(f"the compiler has no {name}")
    return found
