"""`mdi models`: the families that this build runs."""

from __future__ import annotations

from rich.table import Column, Table

from mdi.cli.screen import out


def models() -> None:
    """List the families of models that can be served, by the architecture that their config.json names."""
    from mdi.models.registry import FAMILIES

    table = Table("models", Column("architecture in config.json", no_wrap=True), "reads")
    for architecture, family in FAMILIES.items():
        table.add_row(family.models, architecture, "text, images, videos" if family.vision_tower else "text")
    out.print(table)
