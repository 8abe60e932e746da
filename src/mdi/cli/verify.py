"""`mdi verify`."""

from __future__ import annotations

from typing import Annotated

import typer

from mdi.cli.ask import user_message
from mdi.cli.options import (
    DEFAULTS,
    CheckpointOptions,
    Images,
    Model,
    NNodes,
    QuantizationOptions,
    Shards,
    Videos,
    grouped,
)
from mdi.cli.screen import out
from mdi.core.quantization import UNQUANTIZED, ModelQuantization
from mdi.core.tables import UncutTable


@grouped
def verify(
    model: Model,
    formats: QuantizationOptions,
    checkpoint: CheckpointOptions,
    prompt: Annotated[str, typer.Argument(help="The question to compare on.")] = "Describe this.",
    image: Images = None,
    video: Videos = None,
    n_nodes: NNodes = 1,
    shards: Shards = DEFAULTS.cluster.shards,
    dtype: Annotated[str, typer.Option(help="What both sides compute in.")] = "float32",
    max_tokens: Annotated[int, typer.Option(min=1, help="Greedy tokens to compare.")] = 16,
) -> None:
    """Run one prompt through transformers and through this system, and show how far apart they are.

    A quantised model is compared with the numbers that its weights stand for, in float32. With --shards, the numbers
    are those of any group whose plan has so many.
    """
    from mdi.bench.verify import verify as compare

    messages = user_message(prompt, image or [], video or [])
    source = checkpoint.open(model)
    quantization = formats.of(source)
    report = compare(
        source,
        messages,
        dtype=dtype,
        quantization=quantization,
        n_nodes=n_nodes,
        shards=shards,
        max_tokens=max_tokens,
    )
    if not report.same_prompt:
        out.print("the prompts differ: transformers tokenises or resizes this differently")
        raise typer.Exit(1)
    table = UncutTable("position", "largest logit difference", title=_title(dtype, quantization, n_nodes, shards))
    for position, difference in enumerate(report.differences):
        table.add_row(str(position), f"{difference:.3g}")
    out.print(table)
    out.print(f"largest difference relative to the largest logit: {report.relative:.3g}; cosine {report.cosine:.7f}")
    out.print(f"greedy answer: {report.text!r}", markup=False)
    if report.first_difference is None:
        out.print(f"all {len(report.ours)} greedy tokens are equal")
        return
    index = report.first_difference
    theirs, ours = report.theirs[index : index + 1], report.ours[index : index + 1]
    out.print(f"first differing token: {index} (transformers {theirs}, here {ours})")
    raise typer.Exit(1)


def _title(dtype: str, quantization: ModelQuantization, n_nodes: int, shards: int) -> str:
    nodes = f"{n_nodes} node(s)" + f", {shards} shards" * (shards > 1)
    if quantization == UNQUANTIZED:
        return f"{dtype}, {nodes}"
    return f"{quantization} in {dtype} on {nodes}, and the dequantised weights in float32 in transformers"
