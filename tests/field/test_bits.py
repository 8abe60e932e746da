"""One text, bit for bit: logits of a model without and with experts, in every type, however its work is divided."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from testing.checkpoints import tiny_text_config
from torch import Tensor

from mdi.checkpoint.bundled import unpack
from mdi.checkpoint.loader import load_chunk
from mdi.checkpoint.manifest import Manifest
from mdi.checkpoint.prepare import prepare
from mdi.checkpoint.random_weights import write_random_checkpoint
from mdi.checkpoint.source import open_source
from mdi.core.batch import Batch, Slice
from mdi.core.quantization import ModelQuantization
from mdi.kernels.library import library
from mdi.layers.rope import text_positions
from mdi.models.stage import Stage

KINDS = [("bfloat16", None), ("float16", None), ("float32", None), ("bfloat16", "int8"), ("bfloat16", "int4")]
LENGTH, N_SLOTS = 160, 16
VOCABULARY = 256  # ids below it are in every vocabulary

pytestmark = pytest.mark.skipif(library() is None, reason="only our kernels give rows the same bits")


EXPERTS = {
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
    "mlp_only_layers": [1],
}


@pytest.fixture(scope="module", params=["bundled", "experts"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bits") / str(request.param)
    config = tiny_text_config("qwen3_moe", **EXPERTS)
    return unpack(path) if request.param == "bundled" else write_random_checkpoint(path, config)


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind[1] or kind[0])
def pipelines(request: pytest.FixtureRequest, checkpoint: Path) -> Iterator[dict[int, list[Stage]]]:
    """The stages of one node and of three."""
    dtype, format_ = request.param
    source, quantization = open_source(checkpoint), ModelQuantization(format_, format_)
    folders = {n: prepare(source, n, dtype=dtype, quantization=quantization) for n in (1, 3)}
    yield {n: stages_of(folder) for n, folder in folders.items()}
    for folder in folders.values():
        shutil.rmtree(folder)


def stages_of(folder: Path) -> list[Stage]:
    chunks = [load_chunk(folder / chunk.file) for chunk in Manifest.read(folder).chunks]
    return [Stage(chunk, n_slots=N_SLOTS, sequence_length=LENGTH) for chunk in chunks]


def tokens_of(slot: int) -> Tensor:
    return torch.randint(VOCABULARY, (LENGTH,), generator=torch.Generator().manual_seed(slot))


Part = tuple[int, int, int]  # slot, which is also the seed of its tokens; start; end


def run(stages: Sequence[Stage], parts: Sequence[Part]) -> list[Tensor]:
    """Runs one batch through all stages; the logits of each part's tokens."""
    slices = tuple(Slice(slot, start, end - start) for slot, start, end in parts)
    batch = Batch(0, slices, torch.cat([text_positions(start, end - start) for _, start, end in parts], dim=1))
    hidden = stages[0].embed(torch.cat([tokens_of(slot)[start:end] for slot, start, end in parts]))
    for stage in stages[:-1]:
        hidden = stage.run(batch, hidden)
    return list(torch.split(stages[-1].logits(batch, hidden), [part.length for part in slices]))


def in_pieces(stages: Sequence[Stage], slot: int, ends: Sequence[int]) -> Tensor:
    return torch.cat([run(stages, [(slot, start, end)])[0] for start, end in pairwise((0, *ends))])


@pytest.fixture
def alone(pipelines: dict[int, list[Stage]]) -> Tensor:
    """The logits of every token of slot 3, in one piece, on one node."""
    return run(pipelines[1], [(3, 0, LENGTH)])[0]


def test_token_by_token(pipelines: dict[int, list[Stage]], alone: Tensor) -> None:
    """Also what a replay does: it prefills tokens that were decoded one by one."""
    assert torch.equal(in_pieces(pipelines[1], 3, range(1, LENGTH + 1)), alone)


def test_beside_15_others(pipelines: dict[int, list[Stage]], alone: Tensor) -> None:
    """A prompt among prompts, then a stream among streams, each at another position."""
    stages = pipelines[1]
    prompts = run(stages, [(slot, 0, 100 + slot) for slot in range(N_SLOTS)])[3]
    tokens = [
        run(stages, [(slot, step + slot, step + slot + 1) for slot in range(N_SLOTS)])[3] for step in range(100, 140)
    ]
    assert torch.equal(torch.cat([prompts, *tokens]), alone[: 100 + 3 + 40])


def test_on_three_nodes(pipelines: dict[int, list[Stage]], alone: Tensor) -> None:
    assert torch.equal(run(pipelines[3], [(3, 0, LENGTH)])[0], alone)
    assert torch.equal(in_pieces(pipelines[3], 3, (7, 64, 65, 128, LENGTH)), alone)


def test_with_other_numbers_of_threads(pipelines: dict[int, list[Stage]], alone: Tensor) -> None:
    loaded = library()
    assert loaded is not None
    set_threads = loaded.shared("set_threads", ctypes.c_int)
    before: int = loaded.shared("threads", result=ctypes.c_int)()
    try:
        for threads in (1, 2, 3):
            set_threads(threads)
            assert torch.equal(run(pipelines[1], [(3, 0, LENGTH)])[0], alone), threads
            assert torch.equal(in_pieces(pipelines[1], 3, (100, 101, LENGTH)), alone), threads
    finally:
        set_threads(before)
