"""What quantisation costs on real weights: KL divergence and perplexity over public text, beside llama.cpp's Q4_0.

    pip install -e '.[bench,dev]'
    python -m benchmarks.quantization                    # 50,000 tokens of Python's documentation: over an hour
    python -m benchmarks.quantization --tokens 3072      # some minutes, and those of calibrating once
    python -m benchmarks.quantization --model 1.5B       # three times as long, and 15 GB of memory

The model is Qwen2.5-Coder-Instruct (`benchmarks.real_model`). Its float32 weights are the reference. Ours are
chunks of `mdi prepare`, computed as a node computes them, activations quantised. All read the same windows. What was
read is kept in the model's folder, so that a run that was ended goes on where it stopped; remove `quantization` there
to begin anew.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import math
import pydoc
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from benchmarks.figures import Figure, report
from benchmarks.gguf_file import gguf_file
from benchmarks.llama import llama_python
from benchmarks.real_model import add_model_options, chosen_checkpoint
from benchmarks.sides import Side
from mdi.checkpoint.calibration import CalibrationText
from mdi.checkpoint.loader import load_chunk, load_source
from mdi.checkpoint.prepare import prepare
from mdi.checkpoint.source import Source, open_source
from mdi.core.batch import Batch, Slice
from mdi.core.cores import usable_cores
from mdi.core.quantization import UNQUANTIZED, ModelQuantization
from mdi.layers.rope import text_positions
from mdi.models.stage import Stage
from mdi.prompt.tokenizer import Tokenizer

MODULES = (
    "argparse", "asyncio", "collections", "csv", "datetime", "decimal", "difflib", "email.message",
    "fractions", "heapq", "http.client", "inspect", "ipaddress", "json", "logging", "mailbox",
    "multiprocessing", "os", "pathlib", "pickle", "random", "re", "shutil", "socket", "sqlite3", "statistics",
    "string", "subprocess", "tarfile", "tempfile", "textwrap", "threading", "typing",
    "unittest", "urllib.request", "xml.dom", "zipfile",
)  # fmt: skip
WINDOW = 1024
ROWS = 4  # logits that are compared at once: they stay in a processor's cache


@dataclass(frozen=True)
class Kind:
    """One row of the table. text: what int4 is calibrated with. kl, loss: most divergence, most rise of perplexity."""

    name: str
    quantization: ModelQuantization = UNQUANTIZED
    text: CalibrationText | None = None
    kl: float | None = None
    loss: float | None = None


KINDS = (
    Kind("bfloat16"),
    Kind("int8", ModelQuantization("int8", "int8"), None, 0.003, 0.002),
    Kind("int4, nearest", ModelQuantization("int4", "int4")),
    Kind("int4, calibrated", ModelQuantization("int4", "int4"), CalibrationText.default(), 0.055),
)


@dataclass
class Score:
    """Sums over tokens: of -log p, and of the divergence from the reference."""

    nll: float = 0.0
    divergence: float = 0.0
    tokens: int = 0

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll / self.tokens)

    @property
    def kl(self) -> float:
        return self.divergence / self.tokens


class Reading:
    """Scores by name over windows that are read one after the other, kept in a file after each of them."""

    def __init__(self, file: Path, names: Iterable[str]) -> None:
        self._file = file
        kept: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"read": 0, "scores": {}}
        self.scores = {name: Score(**kept["scores"].get(name, {})) for name in names}
        self._read: int = kept["read"]

    def windows(self, windows: Sequence[Tensor], title: str) -> Iterator[Tensor]:
        """Those that are left, with progress."""
        left = windows[self._read :]
        for ids in track(left, title):
            yield ids
            self._read += 1
            kept = {"read": self._read, "scores": {name: asdict(score) for name, score in self.scores.items()}}
            self._file.parent.mkdir(parents=True, exist_ok=True)
            half = self._file.with_suffix(".half")
            half.write_text(json.dumps(kept))
            half.replace(self._file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    parser.add_argument("--tokens", type=int, default=50_000)
    parser.add_argument("--no-llama", action="store_true", help="leave llama.cpp out, which is built first")
    parser.add_argument("--json", type=Path, help="write the table there, too")
    options = parser.parse_args()
    path = chosen_checkpoint(options)
    windows = windows_of(path, options.tokens)
    with torch.inference_mode():
        scores = measure(open_source(path), windows)
    if not options.no_llama:
        scores |= {f"llama.cpp {kind}": llama(path, kind, windows) for kind in ("Q8_0", "Q4_0")}
    title = f"{path.name}, {len(windows) * (WINDOW - 1)} tokens of Python's documentation"
    report(figures(scores), title, options.json)


def windows_of(path: Path, n_tokens: int) -> list[Tensor]:
    """Token ids of Python's own documentation, in windows that are read from nothing."""
    text = "\n".join(pydoc.plain(pydoc.render_doc(name)) for name in MODULES)
    text = re.sub(r"0x[0-9a-f]+", "0x0", text)  # addresses of objects, which no two runs have in common
    ids = torch.tensor(Tokenizer(path).backend.encode(text).ids)
    n_windows = min(len(ids), n_tokens) // WINDOW
    return list(ids[: n_windows * WINDOW].view(-1, WINDOW))


def measure(source: Source, windows: list[Tensor]) -> dict[str, Score]:
    """The scores of the reference and of every kind, window by window, so that no logits are kept."""
    reference = stage_of(load_source(source, dtype="float32"))
    stages = {kind.name: stage_of(load_chunk(chunk(source, kind))) for kind in KINDS}
    reading = Reading(kept(source.path, "ours", windows), ("float32", *stages))
    scores = reading.scores
    for ids in reading.windows(windows, "reading"):
        exact = logits(reference, ids)
        for rows in parts(len(ids)):
            exact[rows] = exact[rows].log_softmax(-1)
        add(scores["float32"], exact, exact, ids)
        for name, stage in stages.items():
            add(scores[name], exact, logits(stage, ids), ids)
        gc.collect()
    return scores


def kept(path: Path, side: str, windows: Sequence[Tensor]) -> Path:
    """The file with what a side has read of these windows."""
    text = hashlib.sha256(torch.stack(tuple(windows)).numpy().tobytes()).hexdigest()[:12]
    return path / "quantization" / "read" / f"{side}-{text}.json"


def chunk(source: Source, kind: Kind) -> Path:
    """The kind's chunk of the whole model, prepared once."""
    folder = source.path / "quantization" / kind.name.replace(", ", "-").replace(" ", "-")
    if not folder.exists():
        print(f"preparing {kind.name}")
        made = prepare(source, 1, dtype="bfloat16", quantization=kind.quantization, calibration=kind.text)
        folder.parent.mkdir(exist_ok=True)
        shutil.move(made, folder)
    return folder / "model_starter.safetensors"


def stage_of(loaded: Any) -> Stage:
    return Stage(loaded, n_slots=1, sequence_length=WINDOW)


def logits(stage: Stage, ids: Tensor) -> Tensor:
    """Of every token of a window: [tokens, vocab_size]."""
    batch = Batch(0, (Slice(0, 0, len(ids)),), text_positions(0, len(ids)))
    return stage.logits(batch, stage.embed(ids))


def add(score: Score, exact: Tensor, other: Tensor, ids: Tensor) -> None:
    """Adds a window: what is predicted after each of its tokens but the last. exact: log p; other: logits."""
    for rows in parts(len(ids) - 1):
        log_p = other[rows].float().log_softmax(-1)
        score.nll -= float(log_p.gather(1, ids[1:][rows, None]).double().sum())
        score.divergence += float((exact[rows].exp() * (exact[rows] - log_p)).sum())
    score.tokens += len(ids) - 1


def parts(rows: int) -> Iterator[slice]:
    return (slice(start, min(start + ROWS, rows)) for start in range(0, rows, ROWS))


def llama(path: Path, kind: str, windows: list[Tensor]) -> Score:
    """llama.cpp's perplexity with the same weights, quantised by the gguf package."""
    gguf, name = str(gguf_file(path, kind)), f"llama.cpp {kind}"
    reading = Reading(kept(path, name, windows), (name,))
    score = reading.scores[name]
    with Side("benchmarks.llama", llama_python(), path=gguf, sequence_length=WINDOW, threads=usable_cores()) as side:
        for ids in reading.windows(windows, name):
            score.nll += side.value("nll", ids=ids.tolist())
            score.tokens += len(ids) - 1
    return score


def figures(scores: dict[str, Score]) -> Iterator[Figure]:
    """A row of divergence and one of perplexity for each kind."""
    exact, peer = scores["float32"].perplexity, scores.get("llama.cpp Q4_0")
    kinds = {kind.name: kind for kind in KINDS}
    for name, score in scores.items():
        if name == "float32":
            continue
        kind = kinds.get(name, Kind(name))
        if not name.startswith("llama"):
            yield Figure(name, "KL divergence", f"{score.kl:.5f}", "float32", score.kl, kind.kl, at_most=True)
        most = 1 + kind.loss if kind.loss else None
        rise = score.perplexity / exact
        yield Figure(name, "perplexity", f"{score.perplexity:.4f}", f"float32 {exact:.4f}", rise, most, at_most=True)
        if peer and kind.text:
            ratio = score.perplexity / peer.perplexity
            against = f"llama.cpp Q4_0 {peer.perplexity:.4f}"
            yield Figure(name, "perplexity", f"{score.perplexity:.4f}", against, ratio, 1.0, at_most=True)


if __name__ == "__main__":
    main()
