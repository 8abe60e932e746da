"""A first look: a small model over three local nodes answers questions about a drawn picture. Needs no network.

Until a trained checkpoint is bundled the model is random, and says so: what is shown is the machinery, not the answers.
"""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table

from mdi.checkpoint.synthetic import tiny_config, write_random_checkpoint
from mdi.engine import Engine
from mdi.params import SamplingParams
from mdi.pipeline.tls import encryption_enabled

N_NODES = 3
PARAMS = SamplingParams(temperature=0.7, seed=1, max_tokens=16)
QUESTIONS = ("What shape is this?", "What colour is the shape?", "Where is the shape?")


def run(out: Console) -> None:
    """Starts the nodes, asks, and prints questions, answers, times and what each node holds."""
    out.print(
        "[bold]This model is random:[/] it was made a moment ago and has learnt nothing, so its answers are noise.\n"
        "What you see working is the rest: a picture encoded, three processes with two layers each, text drawn.\n"
    )
    with _small_checkpoint() as path, Engine(path, n_nodes=N_NODES, encryption=encryption_enabled()) as engine:
        answers = Table("question", "answer", "tokens", "seconds")
        for question in QUESTIONS:
            started = time.perf_counter()
            completion = engine.chat(_about(picture(), question), PARAMS)
            tokens = f"{completion.usage.prompt_tokens} + {completion.usage.completion_tokens}"
            answers.add_row(question, repr(completion.text), tokens, f"{time.perf_counter() - started:.2f}")
        nodes = Table("node", "layers", "process", "memory")
        for node in engine.nodes():
            layers = f"{node.first_layer}-{node.last_layer - 1}"
            nodes.add_row(node.name, layers, str(node.pid), f"{node.resident_bytes / 1e6:,.0f} MB")
    out.print(answers)
    out.print(nodes)
    out.print("With a real model: mdi ask Qwen/Qwen2-VL-2B-Instruct 'What is this?' --image cat.jpg")


def picture() -> bytes:
    """A red circle on grey, as PNG."""
    image = Image.new("RGB", (224, 168), (200, 200, 205))
    ImageDraw.Draw(image).ellipse((30, 40, 120, 130), fill=(200, 30, 30))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@contextmanager
def _small_checkpoint() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="mdi-demo-") as folder:
        yield write_random_checkpoint(Path(folder) / "random-tiny", tiny_config())


def _about(image: bytes, question: str) -> list[dict[str, object]]:
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
