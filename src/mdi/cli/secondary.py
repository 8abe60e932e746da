"""`mdi secondary`."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import Annotated

import typer

from mdi.cli.options import CERTS, Certs, Device, Dtype, Insecure, NodesJson
from mdi.cli.screen import NodeProgress
from mdi.core.errors import ConfigError


def secondary(
    index: Annotated[
        int | None, typer.Argument(help="Which node of --nodes-config this is: 0 is the one after the starter.")
    ] = None,
    chunk: Annotated[
        Path | None,
        typer.Option(help="The node's chunk, as `mdi prepare` wrote it; without one, the starter sends it."),
    ] = None,
    nodes_config: NodesJson = None,
    spare: Annotated[
        int | None, typer.Option(help="Which spare of --nodes-config this is: it waits until a node is lost.")
    ] = None,
    vision: Annotated[bool, typer.Option("--vision", help="This is the vision node of --nodes-config.")] = False,
    cache_folder: Annotated[
        Path | None, typer.Option(help="Where chunks from the starter are kept; ~/.cache/mdi/chunks if not given.")
    ] = None,
    listen: Annotated[
        str | None, typer.Option(help="Address to listen at, host:port; without --nodes-config 127.0.0.1:0.")
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads to compute with.")] = None,
    with_parent: Annotated[bool, typer.Option("--with-parent", help="End when standard input ends.")] = False,
    certs: Certs = CERTS,
    insecure: Insecure = False,
) -> None:
    """Run one node: a secondary, the finisher, the vision node or a spare, as the nodes-config or its chunk says.

    With --nodes-config, address, device, dtype and threads are as written there, unless given here.
    """
    if with_parent:  # before torch is imported: the parent may end meanwhile
        threading.Thread(target=_end_with_standard_input, daemon=True).start()

    from mdi.checkpoint.cache import Cache
    from mdi.cluster.nodes_config import NodesConfig
    from mdi.node.server import serve_node
    from mdi.node.settings import NodeSettings
    from mdi.rpc.tls import Identity, encryption_enabled

    if (index is not None) + (spare is not None) + vision != (nodes_config is not None):
        raise ConfigError(
            "name the nodes-config and this node's place in it: mdi secondary --nodes-config FILE 0 "
            "(or --spare 0, or --vision)"
        )
    name, cache, hands_over = chunk.stem.removeprefix("model_") if chunk else "", None, False
    if nodes_config is not None:
        config = NodesConfig.read(nodes_config)
        place = config.spare(spare) if spare is not None else None
        node = place or (config.vision_node if vision else config.node(index or 0))
        if chunk and node.name != name:
            raise ConfigError(f"this is the {node.name}, but {chunk.name} is the chunk of {name}")
        name, listen = node.name, listen or node.address
        device, dtype, threads = device or node.device, dtype or node.dtype, threads or node.threads
        cache, hands_over = Cache.open(cache_folder), bool(config.spares)
    elif chunk is None:
        raise ConfigError("give this node its chunk, as `mdi prepare` wrote it: --chunk FILE")
    settings = NodeSettings(
        name,
        chunk,
        listen=listen or "127.0.0.1:0",
        device=device or "cpu",
        dtype=dtype,
        threads=threads,
        with_parent=with_parent,
        insecure=insecure,
        identity=Identity.load(certs, name) if encryption_enabled() else None,
        cache=cache,
        hands_over=hands_over,
        progress=None if with_parent else NodeProgress(),
    )
    serve_node(settings)


def _end_with_standard_input() -> None:
    """Ends this process when its parent, which holds the other end of standard input, has ended."""
    sys.stdin.buffer.read()
    os._exit(0)  # a node has nothing to save
