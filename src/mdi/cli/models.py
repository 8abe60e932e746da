"""`mdi models`: the families that this build runs."""

from __future__ import annotations

from mdi.cli.screen import out
from mdi.core.tables import UncutTable


def models() -> None:
    """List the families of models that can be served, by the architecture that their config.json names."""
    from mdi.models.registry import FAMILIES

    table = UncutTable("models", "architecture in config.json", "reads")
    for architecture, family in FAMILIES.items():
        table.add_row(family.models, architecture, "text, images, videos" if family.vision_tower else "text")
    out.print(table)
