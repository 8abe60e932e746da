"""`mdi cache ls` and `mdi cache rm`."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mdi.cli.screen import out, say
from mdi.core.errors import ConfigError
from mdi.core.tables import UncutTable

if TYPE_CHECKING:
    from mdi.checkpoint.cache import CacheEntry

NAME_WIDTH = 24  # enough of a digest to name an entry

app = typer.Typer(
    no_args_is_help=True,
    help="The cache folder: chunks that nodes received, chunks of read-only checkpoints, random checkpoints. "
    "Its size is limited to MDI_CACHE_GB (default: 100); the least recently used entries are removed first.",
)
Folder = Annotated[
    Path | None, typer.Option("--cache-folder", help="The cache folder; ~/.cache/mdi/chunks if not given.")
]


@app.command()
def ls(cache_folder: Folder = None) -> None:
    """List the entries, the least recently used first."""
    from mdi.checkpoint.cache import Cache

    cache = Cache.open(cache_folder)
    entries = cache.entries()
    if entries:
        out.print(entries_table(entries))
    total_bytes = sum(entry.size_bytes for entry in entries)
    say(f"{_gb(total_bytes)} of at most {_gb(cache.limit_bytes)} in {cache.folder}")


def entries_table(entries: Sequence[CacheEntry]) -> UncutTable:
    table = UncutTable("entry", "contents", "size", "last used", "", narrow=True)
    for entry in entries:
        size, used = _gb(entry.size_bytes), f"{datetime.fromtimestamp(entry.used_s):%Y-%m-%d %H:%M}"
        table.add_row(entry.name[:NAME_WIDTH], entry.contents, size, used, "in use" if entry.in_use else "")
    return table


@app.command()
def rm(
    digest: Annotated[str | None, typer.Argument(help="An entry, or the beginning of its name.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Remove all entries that are not in use.")] = False,
    cache_folder: Folder = None,
) -> None:
    """Remove entries. None that is in use is removed."""
    from mdi.checkpoint.cache import Cache

    if (digest is None) != everything:
        raise ConfigError("name an entry, as `mdi cache ls` shows it, or remove all of them with --all")
    entries = Cache.open(cache_folder).entries()
    chosen = entries if digest is None else [_only(entries, digest)]
    for entry in chosen:
        if entry.remove():
            say(f"removed {entry.name[:NAME_WIDTH]} ({_gb(entry.size_bytes)})")
        elif everything:
            say(f"{entry.name[:NAME_WIDTH]} is in use and stays")
        else:
            raise ConfigError(f"{entry.name[:NAME_WIDTH]} is in use: stop the server or node that uses it first")


def _only(entries: list[CacheEntry], digest: str) -> CacheEntry:
    found = [entry for entry in entries if entry.name.startswith(digest)]
    if len(found) != 1:
        count = "no entry" if not found else f"{len(found)} entries"
        raise ConfigError(f"{count} of the cache begin with {digest!r}: see `mdi cache ls`")
    return found[0]


def _gb(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:,.2f} GB"
