"""`mdi secondary`."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mdi.cli.logs import LogFormat, LogFormatOption, set_up_logs
from mdi.cli.options import CERTS, Certs, Device, Dtype, Insecure, NodesJson, grouped
from mdi.cli.parent import OPTION, end_with_parent
from mdi.cli.screen import BytesProgress
from mdi.core.errors import ConfigError

if TYPE_CHECKING:
    from mdi.cluster.nodes_config import NodeConfig, NodesConfig
    from mdi.node.settings import NodeSettings
    from mdi.rpc.tls import Identity


@dataclass(frozen=True)
class NodeOptions:
    """Which node runs, and how."""

    index: Annotated[
        int | None, typer.Argument(help="Which node of --nodes-config this is: 0 is the one after the starter.")
    ] = None
    chunk: Annotated[
        Path | None,
        typer.Option(help="The node's chunk, as `mdi prepare` wrote it; without one, the starter sends it."),
    ] = None
    nodes_config: NodesJson = None
    spare: Annotated[
        int | None, typer.Option(help="Which spare of --nodes-config this is: it waits until a node is lost.")
    ] = None
    vision: Annotated[bool, typer.Option("--vision", help="This is the vision node of --nodes-config.")] = False
    role: Annotated[
        str | None, typer.Option(help="Which node this is (secondary0, finisher), where no nodes-config says it.")
    ] = None
    cache_folder: Annotated[
        Path | None, typer.Option(help="Where chunks from the starter are kept; ~/.cache/mdi/chunks if not given.")
    ] = None
    listen: Annotated[
        str | None, typer.Option(help="Address to listen at, host:port; without --nodes-config 127.0.0.1:0.")
    ] = None
    dtype: Dtype = None
    device: Device = None
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads to compute with.")] = None
    with_parent: Annotated[bool, typer.Option(OPTION, help="End when standard input ends.")] = False
    identity_pipe: Annotated[
        int | None, typer.Option(hidden=True, help="Open file that the parent has written the identity to.")
    ] = None
    certs: Certs = CERTS
    insecure: Insecure = False
    log_format: LogFormatOption = LogFormat.TEXT

    @cached_property
    def place(self) -> NodeConfig:
        """The nodes-config's entry of this node, or one for its chunk. Raises ConfigError where options name none."""
        return _place(self._config, self.index, self.spare, self.vision, self.role, self.chunk)

    def settings(self) -> NodeSettings:
        """Raises ConfigError for options that contradict each other, the nodes-config or the certificates."""
        from mdi.checkpoint.cache import Cache
        from mdi.node.settings import NodeSettings
        from mdi.rpc.tls import encryption_enabled

        config, node = self._config, self.place
        identity = self._identity(node) if encryption_enabled() else None
        return NodeSettings(
            identity.name if identity else node.name,
            _chunk_of(node, self.chunk) if self.chunk else None,
            listen=self.listen or node.address,
            device=self.device or node.device or "cpu",
            dtype=self.dtype or node.dtype,
            threads=self.threads or node.threads,
            with_parent=self.with_parent,
            insecure=self.insecure,
            identity=identity,
            cache=Cache.open(self.cache_folder) if config or self.role else None,
            hands_over=bool(config and config.spares),
            progress=None if self.with_parent else BytesProgress(),
            role="" if config and not self.chunk and not self.vision else node.name,
        )

    @cached_property
    def _config(self) -> NodesConfig | None:
        from mdi.cluster.nodes_config import NodesConfig

        return NodesConfig.read(self.nodes_config) if self.nodes_config else None

    def _identity(self, node: NodeConfig) -> Identity:
        from mdi.rpc.tls import Identity

        if self.identity_pipe is not None:
            return Identity.receive(self.identity_pipe)
        return Identity.of_one(self.certs, node.names)


@grouped
def secondary(options: NodeOptions) -> None:
    """Run one node: a secondary, the finisher, the vision node or a spare, as the nodes-config or its chunk says.

    With --nodes-config, address, device, dtype and threads are as written there, unless given here.
    """
    if options.with_parent:
        end_with_parent()

    set_up_logs(options.log_format)

    from mdi.node.server import serve_node

    serve_node(options.settings())
    sys.stdout.flush()
    os._exit(0)  # a thread that still loads or computes would crash while Python ends; there is nothing to save


def _place(
    config: NodesConfig | None,
    index: int | None,
    spare: int | None,
    vision: bool,
    role: str | None,
    chunk: Path | None,
) -> NodeConfig:
    """The nodes-config's entry of this node; without a nodes-config, an entry at any port of this machine."""
    from mdi.cluster.nodes_config import NodeConfig
    from mdi.rpc.tls import NODE_NAME

    if (index is not None) + (spare is not None) + vision != (config is not None) or (config and role):
        raise ConfigError(
            "name the nodes-config and this node's place in it: mdi secondary --nodes-config FILE 0 "
            "(or --spare 0, or --vision)"
        )
    if role and not NODE_NAME.fullmatch(role):
        raise ConfigError(f"there is no role {role!r}: roles are secondary0, secondary1, ..., finisher, vision, spare0")
    if config is None:
        name = role or (_name_of(chunk) if chunk else None)
        if name is None:
            raise ConfigError("give this node its chunk, as `mdi prepare` wrote it: --chunk FILE")
        return NodeConfig(name, key="", addr="127.0.0.1", port=0)
    if spare is not None:
        return config.spare(spare)
    return config.vision_node if vision else config.node(index or 0)


def _chunk_of(node: NodeConfig, chunk: Path) -> Path:
    """The file of a node's chunk. The last node's may be named by its place in the nodes-config, as in the guide."""
    from mdi.checkpoint.manifest import chunk_file

    if _name_of(chunk) not in node.names:
        raise ConfigError(f"this is the {node.name}, but {chunk.name} is the chunk of {_name_of(chunk)}")
    written = chunk.with_name(chunk_file(node.name))
    return written if written.exists() and not chunk.exists() else chunk


def _name_of(chunk: Path) -> str:
    return chunk.stem.removeprefix("model_")
