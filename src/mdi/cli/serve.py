"""`mdi serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mdi.cli.options import EngineOptions, MaxPixels, MaxSequences, MinPixels, SequenceLength, grouped
from mdi.cli.screen import err, nodes_table
from mdi.core.errors import ConfigError


@grouped
def serve(
    options: EngineOptions,
    model: Annotated[str | None, typer.Argument(help="A checkpoint's folder, or its name on the hub.")] = None,
    ckpt: Annotated[str | None, typer.Option(help="The same as the argument.")] = None,
    host: Annotated[str, typer.Option(help="Address the HTTP server binds.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the HTTP server; 0 picks a free one.")] = 8000,
    sequence_length: SequenceLength = None,
    max_sequences: MaxSequences = 16,
    vision_cache_mb: Annotated[
        int, typer.Option(min=0, help="Memory for encoded images and videos, kept for further requests.")
    ] = 256,
    min_pixels: MinPixels = None,
    max_pixels: MaxPixels = None,
    media_dir: Annotated[Path | None, typer.Option(help="Requests may name files in this folder.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="MDI_API_KEY", help="Key that requests must bring.")] = None,
    recovery_timeout: Annotated[float, typer.Option(help="Seconds that requests wait for lost nodes.")] = 120,
    spare_after: Annotated[
        float, typer.Option(help="Seconds that a lost node has to come back before a spare takes its place.")
    ] = 5,
) -> None:
    """Serve a model over HTTP: OpenAI's routes, /generate and /generate/multimodal."""
    if (model is None) == (ckpt is None):
        raise ConfigError("name one checkpoint: mdi serve CHECKPOINT")
    from mdi.gateway.app import GatewayConfig, bind
    from mdi.gateway.app import serve as serve_http

    with (
        bind(host, port) as bound,
        options.start(
            model or ckpt or "",
            sequence_length=sequence_length,
            max_sequences=max_sequences,
            vision_cache_bytes=vision_cache_mb * 2**20,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
            media_dir=media_dir,
            any_file=False,
            recovery_timeout_s=recovery_timeout,
            spare_after_s=spare_after,
        ) as engine,
    ):
        err.print(nodes_table(engine.model_name, engine.nodes()))
        serve_http(engine, bound, GatewayConfig(api_key=api_key))
