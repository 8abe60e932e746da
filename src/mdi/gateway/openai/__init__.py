"""OpenAI's routes, as its official client uses them: chat completions, completions and models. One file a route."""

from __future__ import annotations

from fastapi import APIRouter

from mdi.core.config import GatewayConfig
from mdi.gateway.engine import TextEngine
from mdi.gateway.openai import chat, completions, embeddings, models, responses


def router(engine: TextEngine, served: models.ServedModel, config: GatewayConfig) -> APIRouter:
    routes = APIRouter(prefix="/v1")
    routes.include_router(models.router(served))
    routes.include_router(chat.router(engine, served, config))
    routes.include_router(completions.router(engine, served, config))
    routes.include_router(responses.router(engine, served, config))
    routes.include_router(embeddings.router(served))
    return routes
