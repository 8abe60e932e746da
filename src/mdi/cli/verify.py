"""`mdi verify`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from mdi.cli.ask import user_message
from mdi.cli.options import CheckpointOptions, Images, Model, NNodes, Videos, grouped
from mdi.cli.screen import out


@grouped
def verify(
    model: Model,
    checkpoint: CheckpointOptions,
    prompt: Annotated[str, typer.Argument(help="The question to compare on.")] = "Describe this.",
    image: Images = None,
    video: Videos = None,
    n_nodes: NNodes = 1,
    dtype: Annotated[str, typer.Option(help="What both sides compute in.")] = "float32",
    max_tokens: Annotated[int, typer.Option(min=1, help="Greedy tokens to compare.")] = 16,
) -> None:
    """Run one prompt through transformers and through this system, and show how far apart they are."""
    from mdi.bench.verify import verify as compare

    messages = user_message(prompt, image or [], video or [])
    report = compare(checkpoint.open(model), messages, dtype=dtype, n_nodes=n_nodes, max_tokens=max_tokens)
    if not report.same_prompt:
        out.print("the prompts differ: transformers tokenises or resizes this differently")
        raise typer.Exit(1)
    table = Table("position", "largest logit difference", title=f"{dtype}, {n_nodes} node(s)")
    for position, difference in enumerate(report.differences):
        table.add_row(str(position), f"{difference:.3g}")
    out.print(table)
    out.print(f"largest difference relative to the largest logit: {report.relative:.3g}; cosine {report.cosine:.7f}")
    if report.first_difference is None:
        out.print(f"all {len(report.ours)} greedy tokens are equal")
        return
    index = report.first_difference
    theirs, ours = report.theirs[index : index + 1], report.ours[index : index + 1]
    out.print(f"first differing token: {index} (transformers {theirs}, here {ours})")
    raise typer.Exit(1)
