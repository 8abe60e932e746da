"""The HTTP server: puts middleware and routes together, binds an address and runs until it is stopped."""

from __future__ import annotations

import socket

import uvicorn
from fastapi import FastAPI

from mdi.core.config import GatewayConfig
from mdi.core.errors import ConfigError
from mdi.gateway import errors, generate, health, openai
from mdi.gateway.engine import TextEngine
from mdi.gateway.middleware.api_key import ApiKey
from mdi.gateway.middleware.body_limit import BodyLimit

DRAIN_S = 30


def create_app(engine: TextEngine, config: GatewayConfig = GatewayConfig()) -> FastAPI:
    """The application, for any ASGI server."""
    app = FastAPI(title="MDI-LLM", summary="One vision-language model over the machines you already have.")
    errors.install(app)
    app.add_middleware(BodyLimit, max_bytes=config.max_body_bytes)
    if config.api_key is not None:
        app.add_middleware(ApiKey, key=config.api_key)  # added last, so it runs first
    app.include_router(generate.router(engine, config))
    app.include_router(health.router(engine))
    app.include_router(openai.router(engine, config))
    return app


def serve(engine: TextEngine, bound: socket.socket, config: GatewayConfig = GatewayConfig()) -> None:
    """Serves on a bound socket until SIGINT or SIGTERM; running requests then have DRAIN_S to end."""
    address, port = bound.getsockname()[:2]
    shown = f"[{address}]" if ":" in address else address
    print(f"serving {engine.model_name} at http://{shown}:{port}", flush=True)  # noqa: T201
    app = create_app(engine, config)
    uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=DRAIN_S)).run(sockets=[bound])


def bind(host: str, port: int) -> socket.socket:
    """Takes the address before the model is loaded; connections wait until it is. Port 0 picks a free port.

    Raises ConfigError when the address cannot be bound.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
    except OSError:
        raise ConfigError(f"the host {host!r} is not known here") from None
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen()  # two sockets may bind the same port as long as neither listens
    except OSError as error:
        bound.close()
        raise ConfigError(
            f"port {port} on {host} cannot be bound ({error.strerror}): choose another with --port"
        ) from None
    return bound
