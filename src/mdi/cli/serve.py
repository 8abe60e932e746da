"""`mdi serve`."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from mdi.cli.completion import checkpoints
from mdi.cli.config_file import use_config_file
from mdi.cli.gateway_options import GatewayOptions
from mdi.cli.logs import LogFormat, LogFormatOption, set_up_logs
from mdi.cli.options import (
    DEFAULTS,
    EngineOptions,
    KvCacheDtype,
    KvCacheGb,
    MaxPixels,
    MaxSequences,
    MinPixels,
    SequenceLength,
    grouped,
    setting,
)
from mdi.cli.screen import err, say, show_nodes
from mdi.cli.values import limits_of_kinds, tokens, words
from mdi.core.config import MEBIBYTE
from mdi.core.errors import ConfigError


@grouped
def serve(
    options: EngineOptions,
    gateway: GatewayOptions,
    model: Annotated[
        str | None, typer.Argument(help="A checkpoint's folder, or its name on the hub.", autocompletion=checkpoints)
    ] = None,
    ckpt: Annotated[str | None, typer.Option(help="The same as the argument.", autocompletion=checkpoints)] = None,
    config: Annotated[  # noqa: ARG001  # its callback has used it
        Path | None,
        typer.Option(
            help="YAML file with options of this command, under their long names; typed ones override it.",
            is_eager=True,
            callback=use_config_file,
        ),
    ] = None,
    sequence_length: SequenceLength = None,
    max_sequences: MaxSequences = DEFAULTS.cache.max_sequences,
    batch_tokens: Annotated[
        int, setting("batch_tokens", "--batch-tokens", "--max-num-batched-tokens", parser=tokens, metavar="INTEGER")
    ] = DEFAULTS.cache.batch_tokens,
    kv_cache_gb: KvCacheGb = None,
    kv_cache_dtype: KvCacheDtype = None,
    vision_cache_mb: Annotated[
        int, typer.Option(min=0, help="Mebibytes for encoded images and videos, kept for further requests.")
    ] = DEFAULTS.cache.vision_cache_bytes // MEBIBYTE,
    min_pixels: MinPixels = None,
    max_pixels: MaxPixels = None,
    media_dir: Annotated[Path | None, setting("media_dir", "--media-dir", "--allowed-local-media-path")] = None,
    media_domain: Annotated[
        list[str] | None, setting("media_domains", "--media-domain", "--allowed-media-domains")
    ] = None,
    limit_mm_per_prompt: Annotated[
        str | None, typer.Option(help="Most images and videos of one request: image=2,video=1, or a JSON object.")
    ] = None,
    chat_template: Annotated[str | None, setting("chat_template")] = None,
    tool_call_parser: Annotated[str, setting("tool_call_parser")] = DEFAULTS.model.tool_call_parser,
    enable_auto_tool_choice: Annotated[  # noqa: ARG001
        bool, typer.Option("--enable-auto-tool-choice", help="As in vLLM; the model may always choose tools here.")
    ] = False,
    reasoning_parser: Annotated[str, setting("reasoning_parser")] = DEFAULTS.model.reasoning_parser,
    generation_config: Annotated[str, setting("generation_config")] = DEFAULTS.model.generation_config,
    recovery_timeout: Annotated[float, setting("recovery_timeout_s")] = DEFAULTS.cluster.recovery.recovery_timeout_s,
    spare_after: Annotated[float, setting("spare_after_s", min=0)] = DEFAULTS.cluster.manual.spare_after_s,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page of the server in a browser.")] = False,
    log_format: LogFormatOption = LogFormat.TEXT,
    replicas: Annotated[
        str | None,
        typer.Option(
            help="Whole pipelines on the Ray cluster, behind one address: a number, or least:most, as queues ask for."
        ),
    ] = None,
) -> None:
    """Serve a model over HTTP: OpenAI's routes, /generate and /generate/multimodal."""
    if (model is None) == (ckpt is None):
        raise ConfigError("name one checkpoint: mdi serve CHECKPOINT")
    from mdi.gateway.server import bind, check_files, page_url, raise_open_files
    from mdi.gateway.server import serve as serve_http

    name = model or ckpt or ""
    http = gateway.config()
    check_files(http)
    limits = limits_of_kinds(limit_mm_per_prompt, "--limit-mm-per-prompt")
    set_up_logs(log_format, access=not gateway.no_access_log)
    raise_open_files()
    settings = {
        "sequence_length": sequence_length,
        "max_sequences": max_sequences,
        "batch_tokens": batch_tokens,
        "kv_cache_gb": kv_cache_gb,
        "kv_cache_dtype": kv_cache_dtype,
        "vision_cache_bytes": vision_cache_mb * MEBIBYTE,
        "min_pixels": min_pixels,
        "max_pixels": max_pixels,
        "media_dir": media_dir,
        "media_domains": words(media_domain, "--media-domain"),
        "max_images": limits.get("image"),
        "max_videos": limits.get("video"),
        "any_file": False,
        "chat_template": chat_template,
        "generation_config": generation_config,
        "tool_call_parser": tool_call_parser,
        "reasoning_parser": reasoning_parser,
        "recovery_timeout_s": recovery_timeout,
        "spare_after_s": spare_after,
    }
    if replicas is not None and open_page:
        raise ConfigError("--open is for a server on this machine: open the address of the replicas in a browser")
    if replicas is not None:
        from mdi.cli.replicas import Application, ReplicaCount, serve_replicas

        count = ReplicaCount.parse(replicas)
        settled = options.config(name, **settings)
        application = Application(settled, http, count, log_format, access_log=not gateway.no_access_log)
        serve_replicas(application, gateway.port)
        return
    with bind(gateway.host, gateway.port) as bound, options.start(name, **settings) as engine:
        show_nodes(engine.model_name, engine.nodes())
        if open_page:
            _open_page(page_url(bound, http))
        serve_http(engine, bound, http)


def _open_page(url: str) -> None:
    """Connections wait until the server takes them."""
    if not webbrowser.open(url):
        say(f"no browser could be opened here: open {url} in one", err)
