"""Loss and accuracy over the steps of a run, as a picture."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot


def draw_curves(log: Path, picture: Path) -> None:
    """Reads log.jsonl, one JSON object a line; writes a PNG."""
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    losses = [entry for entry in entries if "loss" in entry]
    scores = [entry for entry in entries if "loss" not in entry]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5), constrained_layout=True)
    for name in ("loss", "grounding", "cells"):
        shown = [entry for entry in losses if entry.get(name, 0) > 0]
        left.plot([entry["step"] for entry in shown], [entry[name] for entry in shown], label=name)
    left.set(xlabel="step", yscale="log", title="training loss")
    left.legend()
    right.set_prop_cycle(color=matplotlib.color_sequences["tab20"])
    for skill in [name for name in (scores[-1] if scores else {}) if name != "step"]:
        right.plot([entry["step"] for entry in scores], [entry.get(skill) for entry in scores], label=skill)
    right.set(xlabel="step", ylim=(0, 1), title="held-out questions answered exactly")
    right.legend(fontsize="small")
    right.grid(alpha=0.3)
    figure.savefig(picture, dpi=90)
    pyplot.close(figure)
