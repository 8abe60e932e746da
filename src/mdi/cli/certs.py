"""`mdi certs init` and `mdi certs node`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mdi.cli.options import CERTS
from mdi.cli.screen import say

app = typer.Typer(
    no_args_is_help=True,
    help="Certificates for encrypted links between nodes. Make all of them in one place, copy each node its own, "
    "and start every node with ENABLE_ENCRYPTION=1.",
)
Folder = Annotated[Path, typer.Option(help="Folder with the authority, and with what it makes.")]
Days = Annotated[int, typer.Option(help="How long it is valid.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]


@app.command()
def init(folder: Folder = CERTS, days: Days = 3650, force: Force = False) -> None:
    """Make an authority: its key makes certificates good, and stays here."""
    from mdi.rpc.authority import create_authority

    create_authority(folder, days=days, force=force)
    say(
        f"made {folder}/ca.pem and {folder}/ca.key. Keep ca.key here, and secret: with it anyone can join.\n"
        f"Next, for every node and the starter: mdi certs node NAME"
    )


@app.command()
def node(
    name: Annotated[str, typer.Argument(help="starter, secondary0, secondary1, ..., finisher, spare0, ...")],
    addr: Annotated[
        list[str] | None, typer.Option(help="A host name or IP address of the node, to note in it.")
    ] = None,
    folder: Folder = CERTS,
    days: Days = 90,
    force: Force = False,
) -> None:
    """Make a node's certificate. Peers check the node's name in it, so it may move to another address."""
    from mdi.rpc.authority import create_node, expiry

    identity = create_node(folder, name, addr or [], days=days, force=force)
    say(
        f"made {folder}/{name}.pem and {folder}/{name}.key, valid until {expiry(identity):%Y-%m-%d}.\n"
        f"Copy them, and {folder}/ca.pem, into the folder certs where {name} runs."
    )
