"""`mdi serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mdi.cli.options import (
    DEFAULTS,
    EngineOptions,
    KvCacheDtype,
    KvCacheGb,
    MaxPixels,
    MaxSequences,
    MinPixels,
    SequenceLength,
    Shards,
    grouped,
    setting,
)
from mdi.cli.screen import err, nodes_table
from mdi.core.config import MEBIBYTE, GatewayConfig
from mdi.core.errors import ConfigError

GATEWAY = GatewayConfig()


@grouped
def serve(
    options: EngineOptions,
    model: Annotated[str | None, typer.Argument(help="A checkpoint's folder, or its name on the hub.")] = None,
    ckpt: Annotated[str | None, typer.Option(help="The same as the argument.")] = None,
    host: Annotated[str, setting("host")] = GATEWAY.host,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the HTTP server; 0 picks a free one.")] = 8000,
    sequence_length: SequenceLength = None,
    max_sequences: MaxSequences = DEFAULTS.cache.max_sequences,
    kv_cache_gb: KvCacheGb = None,
    kv_cache_dtype: KvCacheDtype = None,
    shards: Shards = DEFAULTS.cluster.shards,
    vision_cache_mb: Annotated[
        int, typer.Option(min=0, help="Mebibytes for encoded images and videos, kept for further requests.")
    ] = DEFAULTS.cache.vision_cache_bytes // MEBIBYTE,
    min_pixels: MinPixels = None,
    max_pixels: MaxPixels = None,
    media_dir: Annotated[Path | None, setting("media_dir")] = None,
    api_key: Annotated[str | None, setting("api_key", envvar="MDI_API_KEY")] = None,
    allow_host: Annotated[list[str] | None, setting("allow_hosts", "--allow-host")] = None,
    allow_origin: Annotated[list[str] | None, setting("allow_origins", "--allow-origin")] = None,
    max_body_mb: Annotated[
        int, typer.Option(min=1, help="Mebibytes of a request sent as JSON, files as data: URLs included.")
    ] = GATEWAY.max_body_bytes // MEBIBYTE,
    max_upload_mb: Annotated[
        int, typer.Option(min=1, help="Mebibytes of a request sent as a form with files.")
    ] = GATEWAY.max_upload_bytes // MEBIBYTE,
    strict_requests: Annotated[bool, setting("strict_requests", "--strict-requests")] = False,
    drain_timeout: Annotated[float, setting("drain_timeout_s", min=0)] = GATEWAY.drain_timeout_s,
    recovery_timeout: Annotated[float, setting("recovery_timeout_s")] = DEFAULTS.cluster.recovery.recovery_timeout_s,
    spare_after: Annotated[float, setting("spare_after_s", min=0)] = DEFAULTS.cluster.manual.spare_after_s,
) -> None:
    """Serve a model over HTTP: OpenAI's routes, /generate and /generate/multimodal."""
    if (model is None) == (ckpt is None):
        raise ConfigError("name one checkpoint: mdi serve CHECKPOINT")
    from mdi.gateway.server import bind, raise_open_files
    from mdi.gateway.server import serve as serve_http

    config = GatewayConfig(
        host=host,
        api_key=api_key,
        allow_hosts=tuple(allow_host or ()),
        allow_origins=tuple(allow_origin or ()),
        max_body_bytes=max_body_mb * MEBIBYTE,
        max_upload_bytes=max_upload_mb * MEBIBYTE,
        strict_requests=strict_requests,
        drain_timeout_s=drain_timeout,
    )
    raise_open_files()
    with (
        bind(host, port) as bound,
        options.start(
            model or ckpt or "",
            sequence_length=sequence_length,
            max_sequences=max_sequences,
            kv_cache_gb=kv_cache_gb,
            kv_cache_dtype=kv_cache_dtype,
            shards=shards,
            vision_cache_bytes=vision_cache_mb * MEBIBYTE,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
            media_dir=media_dir,
            any_file=False,
            recovery_timeout_s=recovery_timeout,
            spare_after_s=spare_after,
        ) as engine,
    ):
        err.print(nodes_table(engine.model_name, engine.nodes()))
        serve_http(engine, bound, config)
