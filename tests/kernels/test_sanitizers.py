"""Kernels under AddressSanitizer and UBSan, on random shapes at the edges of panels, groups, tiles and blocks."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mdi.kernels import build

KERNELS = ("products", "attention", "experts", "decoder", "norms", "rotary", "vocabulary", "pack", "pool", "memory")
SANITIZED = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g", "-O0")
PROGRAM = """
import ctypes, random, sys
from pathlib import Path
import torch
from mdi.core.group import InputShards, LayerShards, Rank
from mdi.core.quantization import INT4, INT4_MINIMUMS, INT8, INT8_32, INT8_32_MINIMUMS
from mdi.kernels import attention, decoder, experts, norms, packed, vocabulary
from mdi.kernels.decoder import LayerWeights, NativeLayers
from mdi.kernels.experts import PackedExperts
from mdi.kernels.library import Library
from mdi.kernels.packed import PackedWeight, product
from mdi.layers.quantize import quantize

isa, path = sys.argv[1:]
loaded = Library(isa, Path(path), ctypes.CDLL(path))
for module in (attention, decoder, experts, norms, packed, vocabulary):
    module.library = lambda: loaded
loaded.shared("set_threads", ctypes.c_int)(2)
chance = random.Random(0)
torch.manual_seed(0)
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def weight(outputs, inputs, format_, dtype):
    numbers = torch.randn(outputs, inputs)
    return numbers.to(dtype) if format_ is None else quantize(numbers, format_)


def products():
    format_ = chance.choice([None, INT8, INT8_32, INT8_32_MINIMUMS, INT4, INT4_MINIMUMS])
    dtype = chance.choice(FLOATS)
    inputs = chance.randint(1, 200) if format_ is None else chance.randint(1, 5) * 64
    outputs, rows = 2 * chance.randint(1, 70), chance.choice([1, 2, 3, 5, 7, 17, 33])
    gate = chance.choice(["none", "none", "silu", "tanh_gelu"])
    packed = PackedWeight.pack(weight(outputs, inputs, format_, dtype), gate=gate)
    x = torch.randn(rows, inputs, dtype=dtype)
    return product(packed, x, bias=torch.randn(outputs), residual=torch.randn(rows, packed.width, dtype=dtype))


def attending():
    dtype, kv_heads, dim = chance.choice(FLOATS), chance.randint(1, 3), 2 * chance.randint(1, 65)
    heads, rows = kv_heads * chance.randint(1, 7), chance.choice([1, 2, 5, 16, 67])
    before = chance.choice([0, 1, 63, 530])
    int8 = chance.random() < 0.3
    cache = torch.zeros(2, before + rows, 2, kv_heads, dim, dtype=torch.int8 if int8 else dtype)
    scales = torch.zeros(cache.shape[:-1]) if int8 else None
    tables = torch.randn(2, before + rows, dim // 2)
    made = []
    for start, length in ((0, before), (before, rows)):  # what comes before is written first, then read with the rest
        if length:
            run = torch.tensor([[0, 1, start, length]])
            states = torch.randn(length, heads + 2 * kv_heads, dim, dtype=dtype)
            cos, sin = tables[:, start : start + length]
            both = (torch.rand(dim), torch.rand(dim)) if chance.random() < 0.5 else None
            attention.rotate(states, cos, sin, run, cache, scales, n_kv_heads=kv_heads, norms=both, eps=1e-6)
            window = chance.choice([0, 0, 1, 64, 100])
            made.append(attention.attend(states[:, :heads], cache, run, scales, window=window))
    return torch.cat(made)


def attending_fully():
    dtype, heads, dim, frame = chance.choice(FLOATS), chance.randint(1, 3), chance.randint(1, 90), chance.randint(1, 80)
    qkv = torch.randn(2 * frame, 3, heads, dim, dtype=dtype)
    rows = slice(frame + chance.randrange(frame), 2 * frame)
    out = torch.empty(rows.stop - rows.start, heads * dim, dtype=dtype)
    attention.attend_fully(qkv, rows, frame, out)
    return out


def normalising():
    dtype, size = chance.choice(FLOATS), chance.randint(1, 140)
    x, scale, bias = torch.randn(chance.randint(1, 9), size, dtype=dtype), torch.rand(size), torch.rand(size)
    residual = chance.choice([None, x])
    return torch.cat([norms.rms_norm(x, scale, 1e-6, residual), norms.layer_norm(x, scale, bias, 1e-6)])


def mixing():
    format_, dtype = chance.choice([None, INT8, INT4]), chance.choice(FLOATS)
    hidden, inner = (64 * chance.randint(1, 2),) * 2 if format_ else (chance.randint(1, 70), chance.randint(1, 40))
    count, rows = chance.randint(1, 9), chance.choice([1, 2, 3, 9, 20])
    router = PackedWeight.pack(torch.randn(count, hidden).to(dtype))
    gate_up = [PackedWeight.pack(weight(2 * inner, hidden, format_, dtype), gate="silu") for _ in range(count)]
    down = [PackedWeight.pack(weight(hidden, inner, format_, dtype)) for _ in range(count)]
    per_row, x = chance.randint(1, count), torch.randn(rows, hidden, dtype=dtype)
    return PackedExperts(router, gate_up, down, per_row=per_row, normalised=chance.random() < 0.5)(x, x)


class Group:
    def __init__(self, rank):
        self.rank = rank

    def exchange(self, partials):
        self.receive(partials, partials.shape[1])

    def send(self, partials, rows):
        assert partials[self.rank.first_shard : self.rank.last_shard, rows].isfinite().all()

    def receive(self, partials, last_row):
        for shard in set(range(self.rank.n_shards)) - set(self.rank.shards):
            partials[shard, :last_row] = 0.5


def layers():
    dtype, kv_heads, dim = chance.choice(FLOATS), chance.randint(1, 2), 2 * chance.randint(1, 9)
    heads, hidden, inner = kv_heads * chance.randint(1, 3), chance.randint(1, 70), chance.randint(2, 40)
    width, qkv, rows, n_layers = heads * dim, (heads + 2 * kv_heads) * dim, chance.choice([1, 5, 288, 300, 577]), 2
    mixed, post = chance.random() < 0.3, chance.random() < 0.5

    def packed(outputs, inputs, **gate):
        return PackedWeight.pack((torch.randn(outputs, inputs) / inputs**0.5).to(dtype), **gate)

    def mlp():
        gate_up = [packed(2 * inner, hidden, gate="silu") for _ in range(3)]
        down, router = [packed(hidden, inner) for _ in range(3)], packed(3, hidden)
        return PackedExperts(router, gate_up, down, per_row=2, normalised=True) if mixed else (gate_up[0], down[0])

    def layer():
        vectors = [torch.rand(size) for size in (qkv, hidden, hidden, dim, dim)]
        posts = [torch.rand(hidden), torch.rand(hidden)] if post else [None, None]
        return LayerWeights(packed(qkv, hidden), packed(hidden, width), mlp(), *vectors, *posts)

    native = NativeLayers([layer() for _ in range(n_layers)], n_heads=heads, n_kv_heads=kv_heads, eps=1e-6)
    caches = [torch.zeros(2, rows, 2, kv_heads, dim, dtype=dtype) for _ in range(n_layers)]
    tables, runs = [tuple(torch.rand(2, rows, dim // 2))], torch.tensor([[0, 1, 0, rows]])
    cut = InputShards((0, inner // 2, inner), 1)
    shards = LayerShards(InputShards((0, width // 2, width), 1), None if mixed else cut, cut if mixed else None)
    group = chance.choice([None, Group(Rank(0, 2, 3)), Group(Rank(1, 3, 4))])
    given = {} if group is None and chance.random() < 0.5 else {"shards": shards}
    return native.forward(torch.randn(rows, hidden, dtype=dtype), tables, runs, caches, group=group, **given)


def drawing():
    rows, size = chance.randint(1, 4), chance.choice([1, 2, 7, 63, 65, 1031, 5000])
    logits = torch.randn(rows, size)
    ids = vocabulary.highest(logits[0], chance.randint(1, size))
    highest, sums = vocabulary.block_peaks(logits, [0.7] * rows)
    return torch.cat((highest.flatten(), sums.flatten(), logits[0][ids]))


for kernel in (products, attending, attending_fully, normalising, mixing, layers, drawing):
    for _ in range(60 if kernel is products else 40):
        assert kernel().isfinite().all(), kernel
print("done")
"""


@pytest.mark.slow  # for the compiler
@pytest.mark.parametrize("isa", ["scalar", "avx2"])
def test_kernels_stay_within_their_memory(isa: str, tmp_path: Path) -> None:
    target = build.this_machine()
    compiler = build.system_compiler()
    if compiler is None or isa not in target.instruction_sets:
        pytest.skip("no compiler of the system's, or another processor")
    preloaded = [_runtime(compiler, name) for name in ("libasan.so", "libubsan.so")]
    flags = [*build.FLAGS, *SANITIZED, f"-DMDI_ISA={isa}", f"-DMDI_{isa.upper()}=1", *target.instruction_sets[isa]]

    def compiled(name: str) -> str:
        made = tmp_path / f"{name}.o"
        subprocess.run([*compiler, *flags, "-c", str(build.SOURCES / f"{name}.c"), "-o", str(made)], check=True)
        return str(made)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, KERNELS))
    library = tmp_path / "sanitized.so"
    subprocess.run([*compiler, *SANITIZED, "-shared", *objects, "-lm", "-o", str(library)], check=True)
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
