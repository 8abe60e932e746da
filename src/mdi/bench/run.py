"""Runs `mdi bench`: every scenario on the engine in turn, and in transformers where that is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mdi.bench.measure import Run, measure, memory_log
from mdi.bench.peers import Transformers
from mdi.bench.report import Bench, node_memory
from mdi.bench.scenario import Scenario
from mdi.checkpoint.source import Source
from mdi.core.errors import ConfigError
from mdi.core.progress import Progress
from mdi.engine import Engine
from mdi.kernels.threads import computes_with, torch_threads


@dataclass(frozen=True)
class EngineLimits:
    """Limits of an engine that every scenario fits into. max_pixels: None leaves the server's."""

    sequence_length: int
    max_sequences: int
    max_pixels: int | None


def limits_for(scenarios: Sequence[Scenario], max_pixels: int | None = None) -> EngineLimits:
    """The smallest limits that all scenarios fit into. Raises ConfigError for impossible sizes.

    max_pixels: the checkpoint's, which is raised where an image needs it; None for a text model.
    """
    for scenario in scenarios:
        if scenario.streams < 1 or scenario.prompt_tokens < 1 or scenario.answer_tokens < 1:
            raise ConfigError("streams, prompt lengths and answers take whole numbers above 0")
        if scenario.image_side is not None and scenario.image_side < 28:
            raise ConfigError("images have 28 x 28 pixels at least: a smaller one is not a token")
    sides = [scenario.image_side for scenario in scenarios if scenario.image_side]
    return EngineLimits(
        max(scenario.sequence_length for scenario in scenarios),
        max(scenario.streams for scenario in scenarios),
        max([max_pixels or 0, *((side + 28) ** 2 for side in sides)]) or None,
    )


def run_bench(engine: Engine, source: Source, scenarios: Sequence[Scenario], peer: bool, progress: Progress) -> Bench:
    """Measures every scenario once, after one small run that is not counted. peer: transformers does the same after it.

    Both models are in memory then.
    """
    starter = engine.nodes()[0]
    dtype, kernels = starter.dtype, computes_with(starter.device)
    theirs = Transformers(source, dtype) if peer else None
    runs, peers = list[Run](), list[Run]()
    total = (1 + len(scenarios)) * (1 + peer)
    with memory_log(engine) as memory:
        for number, scenario in enumerate([_warm_up(scenarios), *scenarios]):
            progress(scenario.name if number else "warming up", number * (1 + peer), total)
            runs.append(measure(engine, scenario, seed=number))
            if theirs:
                progress(f"transformers: {scenario.name}", number * 2 + 1, total)
                with torch_threads():
                    peers.append(theirs.run(scenario, seed=number))
    progress("done", total, total)
    limits = limits_for(scenarios)
    sizes = node_memory(source.model_config, engine.nodes(), limits.sequence_length * limits.max_sequences)
    return Bench(engine.model_name, dtype, kernels, tuple(runs[1:]), tuple(peers[1:]), sizes, memory)


def _warm_up(scenarios: Sequence[Scenario]) -> Scenario:
    """One stream with the smallest image, if there are any."""
    sides = [scenario.image_side for scenario in scenarios if scenario.image_side]
    shortest = min(scenario.prompt_tokens for scenario in scenarios)
    return Scenario(1, shortest, min(sides, default=None), min(2, scenarios[0].answer_tokens))


def write_files(bench: Bench, folder: Path) -> list[Path]:
    """Writes bench.json, tokens.csv and the plots into a folder, made where needed. Returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    bench.write_json(folder / "bench.json")
    bench.write_csv(folder / "tokens.csv")
    try:
        from mdi.bench.plots import write_plots
    except ImportError:
        raise ConfigError("plots need matplotlib: pip install 'mdi-llm[bench]'") from None
    return [folder / "bench.json", folder / "tokens.csv", *write_plots(folder, bench)]
