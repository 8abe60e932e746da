"""Plots of `mdi bench`'s results. Needs matplotlib (`pip install 'mdi-llm[bench]'`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mdi.bench.measure import MemoryLog, Run
from mdi.bench.report import Bench
from mdi.core.tracing import SpanName

COLORS: dict[SpanName, str] = {
    "fetch": "#9e9e9e",
    "preprocess": "#795548",
    "encode": "#e6a817",
    "prefill": "#3f7fbf",
    "decode": "#4aa564",
    "sample": "#8e5ea2",
}


def write_plots(folder: Path, bench: Bench) -> list[Path]:
    """Writes tokens.png, throughput.png, timeline.png and memory.png. Returns their paths."""
    figures = {
        "tokens": tokens_over_time(bench.runs),
        "throughput": throughput(bench.runs, bench.peers),
        "timeline": timeline(max(bench.runs, key=lambda run: run.scenario.streams)),
        "memory": memory(bench.memory_log),
    }
    paths = []
    for name, figure in figures.items():
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=120)
    return paths


def tokens_over_time(runs: Sequence[Run]) -> Figure:
    """Tokens of all streams together, over the seconds since the start."""
    figure, axes = _figure("tokens of answers over time", "seconds", "tokens")
    for run in runs:
        times_s = sorted(time_s for stream in run.times_s for time_s in stream)
        axes.step(times_s, range(1, len(times_s) + 1), where="post", label=run.scenario.name)
    axes.legend(fontsize="small")
    return figure


def throughput(runs: Sequence[Run], peers: Sequence[Run]) -> Figure:
    """Tokens a second in decode, over streams at once."""
    figure, axes = _figure("decode, all streams together", "streams at once", "tokens a second")
    shortest = min(run.scenario.prompt_tokens for run in runs)
    for name, some in (("here", runs), ("transformers", peers)):
        points = sorted(
            (run.scenario.streams, run.decode_rate)
            for run in some
            if run.scenario.prompt_tokens == shortest and run.scenario.image_side is None
        )
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.legend()
    return figure


def timeline(run: Run) -> Figure:
    """Work of each node over time, and its idle times."""
    figure, axes = _figure(f"what each node did: {run.scenario.name}", "seconds", "")
    names = list(run.nodes)
    for row, name in enumerate(names):
        for work, color in COLORS.items():
            bars = [(span.start_s, span.seconds) for span in run.nodes[name] if span.name == work]
            height = 0.2 if work in ("fetch", "preprocess") else 0.7
            axes.broken_barh(bars, (row - height / 2, height), facecolors=color, label=work if row == 0 else None)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    figure.legend(loc="outside lower center", ncols=len(COLORS), fontsize="small")
    return figure


def memory(log: MemoryLog) -> Figure:
    """Resident memory of every node over time."""
    figure, axes = _figure("resident memory", "seconds", "MB")
    for name, sizes in log.resident_bytes.items():
        axes.plot(log.times_s[-len(sizes) :], [size / 1e6 for size in sizes], label=name)
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


def _figure(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return figure, axes
