"""Options of the HTTP server."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from mdi.cli.options import setting
from mdi.cli.values import words
from mdi.core.config import MEBIBYTE, GatewayConfig

DEFAULTS = GatewayConfig()
Strings = list[str] | None


@dataclass(frozen=True)
class GatewayOptions:
    """What `mdi serve` takes for its HTTP server, under the names of `vllm serve` as well."""

    host: Annotated[str, setting("host")] = DEFAULTS.host
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the HTTP server; 0 picks a free one.")] = 8000
    served_model_name: Annotated[Strings, setting("served_model_name")] = None
    api_key: Annotated[Strings, setting("api_keys", "--api-key", envvar="MDI_API_KEY")] = None
    api_keys: Annotated[Path | None, setting("api_keys_file", "--api-keys")] = None
    metrics_key: Annotated[str | None, setting("metrics_key", envvar="MDI_METRICS_KEY")] = None
    allow_host: Annotated[Strings, setting("allow_hosts", "--allow-host", "--allowed-hosts")] = None
    allow_origin: Annotated[Strings, setting("allow_origins", "--allow-origin", "--allowed-origins")] = None
    root_path: Annotated[str, setting("root_path")] = DEFAULTS.root_path
    ssl_certfile: Annotated[Path | None, setting("ssl_certfile")] = None
    ssl_keyfile: Annotated[Path | None, setting("ssl_keyfile")] = None
    ssl_keyfile_password: Annotated[str | None, setting("ssl_keyfile_password", envvar="MDI_SSL_KEYFILE_PASSWORD")] = (
        None
    )
    ssl_ca_certs: Annotated[Path | None, setting("ssl_ca_certs")] = None
    max_body_mb: Annotated[
        int, typer.Option(min=1, help="Mebibytes of a request sent as JSON, files as data: URLs included.")
    ] = DEFAULTS.max_body_bytes // MEBIBYTE
    max_upload_mb: Annotated[int, typer.Option(min=1, help="Mebibytes of a request sent as a form with files.")] = (
        DEFAULTS.max_upload_bytes // MEBIBYTE
    )
    strict_requests: Annotated[bool, setting("strict_requests", "--strict-requests")] = False
    drain_timeout: Annotated[float, setting("drain_timeout_s", min=0)] = DEFAULTS.drain_timeout_s
    no_access_log: Annotated[
        bool,
        typer.Option("--no-access-log", "--disable-uvicorn-access-log", help="Log no line for each request."),
    ] = False
    otlp_traces_endpoint: Annotated[str | None, setting("otlp_traces_endpoint")] = None
    uvicorn_log_level: Annotated[str, setting("uvicorn_log_level")] = DEFAULTS.uvicorn_log_level

    def config(self) -> GatewayConfig:
        """The settings of the server. Raises ConfigError for those that contradict each other."""
        return GatewayConfig(
            host=self.host,
            served_model_name=words(self.served_model_name, "--served-model-name"),
            api_keys=tuple(self.api_key or ()),
            api_keys_file=self.api_keys,
            metrics_key=self.metrics_key,
            allow_hosts=words(self.allow_host, "--allow-host"),
            allow_origins=words(self.allow_origin, "--allow-origin"),
            root_path=self.root_path,
            ssl_certfile=self.ssl_certfile,
            ssl_keyfile=self.ssl_keyfile,
            ssl_keyfile_password=self.ssl_keyfile_password,
            ssl_ca_certs=self.ssl_ca_certs,
            max_body_bytes=self.max_body_mb * MEBIBYTE,
            max_upload_bytes=self.max_upload_mb * MEBIBYTE,
            strict_requests=self.strict_requests,
            drain_timeout_s=self.drain_timeout,
            otlp_traces_endpoint=self.otlp_traces_endpoint,
            uvicorn_log_level=self.uvicorn_log_level,
        )
