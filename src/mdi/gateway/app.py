"""The HTTP application: middleware and routes together."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline
from starlette.middleware.cors import CORSMiddleware

from mdi.core.config import GatewayConfig
from mdi.gateway import errors, generate, health, openai, openapi, page, tokenize
from mdi.gateway.anthropic import messages
from mdi.gateway.engine import TextEngine
from mdi.gateway.keys import Keys
from mdi.gateway.metrics import ENGINE, Metrics
from mdi.gateway.middleware.api_keys import ApiKeys
from mdi.gateway.middleware.body_limit import BodyLimit
from mdi.gateway.middleware.foreign_pages import ForeignPages
from mdi.gateway.middleware.head import HeadAsGet
from mdi.gateway.middleware.request_log import RequestLog
from mdi.gateway.middleware.root_path import RootPath
from mdi.gateway.middleware.safe_headers import SafeHeaders
from mdi.gateway.middleware.trace import TraceRequests
from mdi.gateway.openai.ignored import HEADER
from mdi.gateway.openai.models import ServedModel
from mdi.gateway.request_record import REQUEST_ID
from mdi.gateway.streaming import Answers
from mdi.gateway.traces import Traces


def create_app(
    engine: TextEngine,
    config: GatewayConfig = GatewayConfig(),
    replicas: health.Replicas | None = None,
) -> FastAPI:
    """The application, for any ASGI server. replicas: where it is one of several."""
    app = FastAPIOffline(  # /docs loads nothing from other sites
        title="MDI-LLM",
        summary="One vision-language model over the machines you already have.",
        redoc_url=None,
    )
    app.state.answers = Answers()
    errors.install(app)
    served = ServedModel(engine, config.served_model_name)
    _add_checks(app, config)
    if config.otlp_traces_endpoint:
        app.state.traces = traces = Traces(config.otlp_traces_endpoint)
        app.add_middleware(TraceRequests, traces=traces, engine=engine, model=served.name)
    app.add_middleware(RequestLog)
    app.state.metrics = Metrics(engine, served.name, replicas.name if replicas else ENGINE)
    app.include_router(page.router())
    app.include_router(generate.router(engine, config))
    app.include_router(health.router(engine, app.state.metrics, replicas))
    app.include_router(openai.router(engine, served, config))
    app.include_router(messages.router(engine, served, config))
    app.include_router(tokenize.router(engine, served, config))
    openapi.complete(app, served.names, needs_key=config.needs_key)
    return app


def _add_checks(app: FastAPI, config: GatewayConfig) -> None:
    """Adds the middleware that may refuse requests, from the innermost to the outermost."""
    app.add_middleware(HeadAsGet)
    app.add_middleware(BodyLimit, max_bytes=config.max_body_bytes, max_upload_bytes=config.max_upload_bytes)
    if config.needs_key:
        keys = Keys(config.api_keys, config.api_keys_file)
        app.add_middleware(ApiKeys, keys=keys, host=config.host, metrics_key=config.metrics_key)
    if config.allow_origins:  # outside the key: preflights have none, and pages may read why they are refused
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.allow_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            allow_credentials=True,
            allow_private_network=True,
            expose_headers=("Retry-After", HEADER, REQUEST_ID),
        )
    if not config.needs_key:
        app.add_middleware(ForeignPages, host=config.host, hosts=config.allow_hosts, origins=config.allow_origins)
    if config.root_path:
        app.add_middleware(RootPath, root_path=config.root_path)
    app.add_middleware(SafeHeaders)
