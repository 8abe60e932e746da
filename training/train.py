"""Trains the bundled checkpoint: `python -m training.train --run runs/first`. Ctrl-C, and call again to go on.

`--from src/mdi/assets/bundled` trains a finished checkpoint further; `--vision-steps 0` skips the first phase.
Writes into the run folder: tokenizer.json, state.pt (to resume), log.jsonl, curves.png, and at the end (or with
--export) checkpoint/, a folder in Hugging Face layout.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.utils.data import DataLoader, Dataset

from training.corpus import corpus, json_corpus
from training.curves import draw_curves
from training.export import export, load
from training.layout import Plan
from training.model import Student
from training.muon import BatchedMuon, fast_dtype
from training.samples import BatchMaker, TrainingBatch
from training.tokens import ChatTokens, train_tokenizer, with_json

WARMUP_STEPS, WARMUP_FROM_CHECKPOINT = 150, 50
DECAY_SHARE = 0.3  # of all steps, at the end: the rate falls to nothing
CLIP = 1.0
HEADS_ALONE_STEPS = 400  # of a run that goes on from a checkpoint: untrained heads would undo what it knows
CELL_WEIGHT, GROUNDING_WEIGHT = 0.4, 1.0
EVALUATE_EVERY = 500
VISION_EVERY = 5  # later on, every fifth step still trains the vision tower alone: such a step is cheap
LOG_EVERY = 20
SAVE_EVERY_S = 120
PREFETCH = 4  # batches of each process that draws
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
CPU = torch.device("cpu")
EVALUATION = (
    Plan("still", (4, 5), 1, 64), Plan("text", (5, 4), 1, 64), Plan("pair", (4, 5), 1, 48), Plan("text", (6, 5), 1, 24),
    Plan("film", (5, 4), 6, 32), Plan("easy", (4, 4), 1, 32), Plan("still", (5, 6), 1, 32),
    Plan("pair", (5, 5), 1, 32), Plan("still", (5, 4), 1, 32, json_share=1.0), Plan("tools", (4, 5), 1, 40),
    Plan("told", (4, 4), 1, 40),
)  # fmt: skip


class Batches(Dataset[TrainingBatch]):
    """The batches of steps first..last, made by worker processes."""

    def __init__(self, maker: BatchMaker, first: int, last: int, vision_steps: int, vision_every: int) -> None:
        self._maker, self._first, self._last = maker, first, last
        self._vision_steps, self._vision_every = vision_steps, vision_every

    def __len__(self) -> int:
        return self._last - self._first

    def __getitem__(self, index: int) -> TrainingBatch:
        step = self._first + index
        vision_alone = bool(self._vision_every) and step % self._vision_every == 0
        return self._maker(step, asks=step >= self._vision_steps and not vision_alone)


def rate(step: int, steps: int, warmup: int = WARMUP_STEPS) -> float:
    """Share of the peak learning rate: warm up, hold, fall (arXiv:2404.06395, section 4)."""
    decay = max(1, int(steps * DECAY_SHARE))
    return min(1.0, (step + 1) / warmup, (steps - step) / decay)


def optimizers(student: Student) -> list[Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for all else. `share` of a group: its part of the learning rate.

    A step of AdamW moves all weights of a row together: the more inputs, the further its output moves. A row of
    the patch embedding has 1,176.
    """
    matrices: list[nn.Parameter] = []
    patches: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in student.named_parameters():
        inside = ("blocks." in name or "layers." in name or "merger.mlp.2" in name) and parameter.ndim == 2
        (matrices if inside else patches if "patch_embed" in name else others).append(parameter)
    muon = BatchedMuon([{"params": matrices, "share": 1.0}], weight_decay=0.05, momentum=0.95)
    groups = [{"params": patches, "share": 0.1}, {"params": others, "share": 0.5}]
    return [muon, AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0, fused=True)]


def autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=fast_dtype(device) == torch.bfloat16)


@torch.no_grad()
def evaluate(student: Student, held_out: Sequence[TrainingBatch]) -> dict[str, float]:
    """Share of held-out questions answered exactly, by skill. Greedy answers: each token given the true ones before."""
    right: dict[str, list[bool]] = defaultdict(list)
    student.eval()
    for batch in (batch.to(student.device) for batch in held_out):
        with autocast(student.device):
            logits, labels, at, _ = student.read(batch, student.encode(batch))
        for skill, correct in answers(batch, logits.argmax(-1) == labels, at):
            right[skill].append(correct)
    student.train()
    return {skill: sum(values) / len(values) for skill, values in sorted(right.items())}


def answers(batch: TrainingBatch, correct: Tensor, at: Tensor) -> Iterator[tuple[str, bool]]:
    """Skill of each question, and whether all that the model chooses of its answer was right."""
    numbers = batch.numbers[:, 1:][at[0], at[1]]
    for row, questions in enumerate(batch.questions):
        wrong = set(numbers[(at[0] == row) & ~correct].tolist())
        yield from ((question.skill, number not in wrong) for number, question in enumerate(questions))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of this run")
    parser.add_argument("--from", type=Path, dest="origin", help="folder of a checkpoint to start with")
    parser.add_argument("--steps", type=int, default=22000)
    parser.add_argument("--vision-steps", type=int, default=5500, help="the first steps train the vision tower alone")
    parser.add_argument("--freeze-vision", action="store_true", help="train the language model alone")
    parser.add_argument("--patches", type=int, default=2048, help="patches of the pictures of a batch")
    parser.add_argument("--rate", type=float, default=1.2e-3, help="peak learning rate")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--device", type=torch.device, default=CPU)
    parser.add_argument("--workers", type=int, default=1, help="processes that draw; one keeps up with two cores")
    parser.add_argument("--export", action="store_true", help="only write checkpoint/ from state.pt")
    arguments = parser.parse_args()
    arguments.run.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    keep_freed_memory()
    run = Run(
        arguments.run,
        arguments.steps,
        arguments.vision_steps,
        arguments.rate,
        arguments.origin,
        arguments.freeze_vision,
        arguments.patches,
        arguments.device,
        arguments.workers,
    )
    if not arguments.export:
        run.train()
    export(run.student, arguments.run / "tokenizer.json", arguments.run / "checkpoint")


def keep_freed_memory() -> None:
    """Tells glibc to keep what is freed: giving every large tensor back to the system costs a tenth of the time."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        for parameter in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            mallopt(parameter, 2**30)


class Run:
    """One training run and its folder."""

    def __init__(
        self,
        folder: Path,
        steps: int,
        vision_steps: int,
        peak: float,
        origin: Path | None = None,
        frozen_vision: bool = False,
        patches: int = 2048,
        device: torch.device = CPU,
        workers: int = 1,
    ) -> None:
        self.folder, self.steps, self.vision_steps, self.peak = folder, steps, vision_steps, peak
        self.frozen_vision, self.workers = frozen_vision, workers
        self.warmup = WARMUP_FROM_CHECKPOINT if origin else WARMUP_STEPS
        self.heads_alone_steps = HEADS_ALONE_STEPS if origin else 0
        tokenizer = folder / "tokenizer.json"
        if not tokenizer.exists():
            base = Tokenizer.from_file(str(origin / "tokenizer.json")) if origin else train_tokenizer(corpus())
            with_json(base, json_corpus()).save(str(tokenizer))
        tokens = ChatTokens(tokenizer)
        self.maker = BatchMaker(tokens, patches_per_batch=patches)
        self.held_out = BatchMaker(tokens, held_out=True)
        self.student = Student().to(device)
        if frozen_vision:
            self.student.freeze_vision()
        self.optimizers = optimizers(self.student)
        self.step = 0
        if (folder / "state.pt").exists():
            self._resume()
        elif origin:
            load(self.student, origin, Tokenizer.from_file(str(tokenizer)))

    def train(self, until: int | None = None) -> None:
        """Goes on to step `until`, by default to the end."""
        last = self.steps if until is None else until
        batches = DataLoader(
            Batches(self.maker, self.step, last, self.vision_steps, 0 if self.frozen_vision else VISION_EVERY),
            batch_size=None,
            num_workers=self.workers,
            prefetch_factor=PREFETCH if self.workers else None,
            pin_memory=self.student.device.type == "cuda",
        )
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
        with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as progress:
            task = progress.add_task("training", total=self.steps, completed=self.step)
            saved = logged = time.monotonic()
            recent: deque[Tensor] = deque(maxlen=LOG_EVERY)
            for batch in batches:
                recent.append(self._update(batch.to(self.student.device)))
                self.step += 1
                progress.update(task, completed=self.step)
                if self.step % LOG_EVERY == 0:
                    loss, grounding, cells = self._means(torch.stack(tuple(recent)))
                    self._log(
                        step=self.step,
                        loss=round(loss, 4),
                        grounding=round(grounding, 4),
                        cells=round(cells, 4),
                        seconds_a_step=round((time.monotonic() - logged) / LOG_EVERY, 3),
                    )
                    logged = time.monotonic()
                    progress.update(task, description=f"loss {loss:.3f}, cells {cells:.3f}")
                if self.step == last or (self.step % EVALUATE_EVERY == 0 and self.step > self.vision_steps):
                    self._evaluate()
                if self.step == last or time.monotonic() - saved > SAVE_EVERY_S:
                    self._save()
                    saved = time.monotonic()

    @cached_property
    def exam(self) -> list[TrainingBatch]:
        return [self.held_out(index, plan) for index, plan in enumerate(EVALUATION)]

    def _evaluate(self) -> None:
        scores = evaluate(self.student, self.exam)
        self._log(step=self.step, **{skill: round(score, 4) for skill, score in scores.items()})

    def _update(self, batch: TrainingBatch) -> Tensor:
        """The losses, still on the device: reading them would wait for it."""
        share = rate(self.step, self.steps, self.warmup)
        for group in chain.from_iterable(optimizer.param_groups for optimizer in self.optimizers):
            group["lr"] = self.peak * share * group["share"]
        self.student.heads_alone = self.step < self.heads_alone_steps
        with autocast(self.student.device):
            losses = answers_loss, grounding_loss, cell_loss = self.student.loss(batch)
        torch.autograd.backward(answers_loss + GROUNDING_WEIGHT * grounding_loss + CELL_WEIGHT * cell_loss)
        nn.utils.clip_grad_norm_(self.student.parameters(), CLIP)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return torch.stack(losses).detach()

    def _means(self, losses: Tensor) -> list[float]:
        """Of each loss over the steps that have it; losses: [steps, 3]."""
        if not losses.isfinite().all():
            raise SystemExit(f"the loss is not finite at step {self.step}: lower --rate")
        means: list[float] = (losses.sum(0) / (losses != 0).sum(0).clamp(min=1)).tolist()
        return means

    def _log(self, **entry: Any) -> None:
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def _save(self) -> None:
        state = {
            "step": self.step,
            "student": self.student.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        torch.save(state, self.folder / "state.tmp")
        (self.folder / "state.tmp").replace(self.folder / "state.pt")
        draw_curves(self.folder / "log.jsonl", self.folder / "curves.png")

    def _resume(self) -> None:
        state = torch.load(self.folder / "state.pt", map_location=self.student.device, weights_only=True)
        self.step = state["step"]
        self.student.load_state_dict(state["student"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


if __name__ == "__main__":
    main()
