"""`mdi bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mdi.cli.options import EngineOptions, KvCacheGb, Model, grouped, parse_numbers
from mdi.cli.screen import out, say, steps_bar
from mdi.core.errors import ConfigError


@grouped
def bench(
    model: Model,
    options: EngineOptions,
    streams: Annotated[str, typer.Option(help="Streams at once, each alike.")] = "1,4,16",
    prompt_lengths: Annotated[str, typer.Option(help="Tokens of prompts, about; streams use the first.")] = "64,512",
    image_sizes: Annotated[str, typer.Option(help="Sides of square images, in pixels; '' for none.")] = "224,448",
    answer_tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 32,
    kv_cache_gb: KvCacheGb = None,
    peer: Annotated[str | None, typer.Option(help="transformers: the same work there as well, and ratios.")] = None,
    out_folder: Annotated[
        Path | None, typer.Option("--out", help="Folder for bench.json, tokens.csv and plots.")
    ] = None,
    trace: Annotated[Path | None, typer.Option(help="File for a trace, for ui.perfetto.dev.")] = None,
) -> None:
    """Measure a model on these nodes: time to first token, between tokens, throughput, and where time and memory go.

    random:qwen2-vl-2b is a model of that shape with random weights: it measures a machine before any download.
    """
    from mdi.bench.run import limits_for, run_bench, write_files
    from mdi.bench.scenario import sweep
    from mdi.bench.trace import write_trace
    from mdi.checkpoint.processing import media_specs

    if peer not in (None, "transformers"):
        raise ConfigError(f"--peer knows transformers, not {peer!r}")
    source = options.open(model)
    sides = parse_numbers(image_sizes, "--image-sizes") if image_sizes and source.model_config.vision else ()
    scenarios = sweep(
        parse_numbers(streams, "--streams"),
        parse_numbers(prompt_lengths, "--prompt-lengths"),
        sides,
        answer_tokens,
    )
    images, _ = media_specs(source)
    limits = limits_for(scenarios, images.max_pixels if images and sides else None)
    engine = options.start(
        str(source.path),
        mmproj=None,  # its folder has it
        sequence_length=limits.sequence_length,
        max_sequences=limits.max_sequences,
        kv_cache_gb=kv_cache_gb,
        max_pixels=limits.max_pixels,
    )
    with engine, steps_bar() as progress:
        task = progress.add_task("", total=None)
        done = run_bench(
            engine,
            source,
            scenarios,
            peer=peer is not None,
            progress=lambda what, n, total: progress.update(task, description=what, completed=n, total=total),
        )
    for table in done.tables():
        out.print(table)
    written = write_files(done, out_folder) if out_folder else []
    if trace:
        write_trace(trace, done.runs)
        written.append(trace)
    for path in written:
        say(f"wrote {path}")
