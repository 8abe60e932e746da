"""`mdi prepare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mdi.cli.options import (
    DEFAULTS,
    N_NODES,
    CheckpointOptions,
    Dtype,
    Groups,
    Layers,
    Model,
    PipelineParallelSize,
    QuantizationOptions,
    Shards,
    TensorParallelSize,
    grouped,
    parse_groups,
    parse_layers,
)
from mdi.cli.screen import bytes_bar, say
from mdi.core.config import ClusterConfig
from mdi.core.quantization import NONE


@grouped
def prepare(
    model: Model,
    formats: QuantizationOptions,
    checkpoint: CheckpointOptions,
    n_nodes: Annotated[int | None, N_NODES] = None,
    dtype: Dtype = None,
    layers: Layers = None,
    pipeline_parallel_size: PipelineParallelSize = None,
    tensor_parallel_size: TensorParallelSize = DEFAULTS.cluster.tensor_parallel_size,
    groups: Groups = None,
    shards: Shards = DEFAULTS.cluster.shards,
    vision_node: Annotated[
        bool, typer.Option("--vision-node", help="One chunk more: the vision tower, for a node of its own.")
    ] = False,
    calibrate: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Text in UTF-8 that int4 weights of the decoder are calibrated with, of the kind that the model will "
            "read; a general one if not given. none: all are rounded to the nearest, which takes seconds.",
        ),
    ] = None,
    skip_convert: Annotated[
        bool, typer.Option("--skip-convert", help="Download nothing: the checkpoint is here.")
    ] = False,
) -> None:
    """Split a checkpoint into one chunk per node, under chunks/{n}nodes/ in its folder."""
    from mdi.checkpoint.calibration import CalibrationText
    from mdi.checkpoint.prepare import prepare as write_chunks

    text = (
        None if calibrate == NONE else CalibrationText.read(Path(calibrate)) if calibrate else CalibrationText.default()
    )
    split = ClusterConfig(
        n_nodes=n_nodes,
        layers=parse_layers(layers),
        pipeline_parallel_size=pipeline_parallel_size,
        tensor_parallel_size=tensor_parallel_size,
        groups=parse_groups(groups),
        shards=shards,
    )
    source = checkpoint.open(model, download=not skip_convert)
    with bytes_bar() as progress:
        task = progress.add_task("writing chunks", total=None)
        folder = write_chunks(
            source,
            split.n_nodes or 1,
            dtype=dtype,
            quantization=formats.of(source),
            calibration=text,
            layers=split.layers,
            groups=split.group_sizes,
            shards=split.shards,
            vision_node=vision_node,
            progress=lambda _what, done, total: progress.update(task, completed=done, total=total),
        )
    n_chunks = (split.n_nodes or 1) + vision_node
    say(f"{n_chunks} chunk{'s' * (n_chunks > 1)} in {folder}")
