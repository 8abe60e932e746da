"""The HTTP application: middleware and routes together."""

from __future__ import annotations

from fastapi import FastAPI

from mdi.core.config import GatewayConfig
from mdi.gateway import errors, generate, health, openai
from mdi.gateway.engine import TextEngine
from mdi.gateway.middleware.api_key import ApiKey
from mdi.gateway.middleware.body_limit import BodyLimit
from mdi.gateway.streaming import Answers


def create_app(engine: TextEngine, config: GatewayConfig = GatewayConfig()) -> FastAPI:
    """The application, for any ASGI server."""
    app = FastAPI(title="MDI-LLM", summary="One vision-language model over the machines you already have.")
    app.state.answers = Answers()
    errors.install(app)
    app.add_middleware(BodyLimit, max_bytes=config.max_body_bytes)
    if config.api_key is not None:
        app.add_middleware(ApiKey, key=config.api_key)  # added last, so it runs first
    app.include_router(generate.router(engine, config))
    app.include_router(health.router(engine))
    app.include_router(openai.router(engine, config))
    return app
