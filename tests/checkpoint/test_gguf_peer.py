"""GGUF files of Qwen3-MoE, Gemma 3 and Qwen3-VL, and their towers: the answers are llama.cpp's on the same files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from testing.checkpoints import (
    tiny_deepstack_config,
    tiny_deepstack_experts_config,
    tiny_gemma_config,
    tiny_text_config,
)
from testing.gguf_files import write_gguf, write_mmproj
from testing.llama_cpp import LlamaCpp

from mdi import Engine, SamplingParams
from mdi.checkpoint.random_weights import write_random_checkpoint

MAX_TOKENS = 12
GREEDY = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
MAY_DIFFER = 1  # answers about images; llama.cpp rounds keys and values to float16, and its merger has tanh's GELU
QUESTIONS = ("What is it?", "How are you?", "Name three primes.")
WHOLE_VOCABULARY = {"vocab_size": 264, "num_hidden_layers": 4}  # llama.cpp expects a token for each embedding
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 64, "norm_topk_prob": True}
FAMILIES = {
    "qwen3_moe": tiny_text_config("qwen3_moe", **EXPERTS, vocab_size=259, head_dim=32, tie_word_embeddings=False),
    "gemma3_text": tiny_gemma_config(num_hidden_layers=7, sliding_window_pattern=6, vocab_size=259),
    "qwen3_vl": tiny_deepstack_config(**WHOLE_VOCABULARY),
    "qwen3_vl_moe": tiny_deepstack_experts_config(**WHOLE_VOCABULARY),
}
TEXT = ("qwen3_moe", "gemma3_text")
MERGES: dict[str, Any] = {"tokenizer.ggml.merges": ["a b"]}  # llama.cpp expects some


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def picture(folder: Path, seed: int) -> list[dict[str, Any]]:
    """A question about an image that no one resizes."""
    path = folder / f"{seed}.png"
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (256, 320, 3), dtype=np.uint8)).save(path)
    return [{"role": "user", "content": [{"type": "image", "image": str(path)}, {"type": "text", "text": "What?"}]}]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_llama_cpp(family: str, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    checkpoint = write_random_checkpoint(tmp_path / family, FAMILIES[family], seed=2)  # answers vary
    file = write_gguf(checkpoint, tmp_path / "model.gguf", "F32")
    their_file = write_gguf(checkpoint, tmp_path / "theirs.gguf", "F32", **MERGES)
    mmproj = None if family in TEXT else write_mmproj(checkpoint, tmp_path / "mmproj.gguf", "F32")
    images = [picture(tmp_path, seed) for seed in range(3)] if mmproj else []
    settings: dict[str, Any] = {"mmproj": mmproj, "media_dir": str(tmp_path)}
    with Engine(file, dtype="float32", **settings) as engine, LlamaCpp(their_file, mmproj) as peer:
        for question in QUESTIONS:
            expected = peer.continuation(engine.tokenize([{"role": "user", "content": question}]), MAX_TOKENS)
            assert engine.chat(question, GREEDY).token_ids == expected
        pairs = [(engine.chat(image, GREEDY).text, peer.answer(image, MAX_TOKENS)) for image in images]
    assert sum(ours != theirs for ours, theirs in pairs) <= MAY_DIFFER, pairs
