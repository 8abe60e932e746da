"""OpenAI's routes, as its official client uses them: chat completions, completions and models. One file a route."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import APIRouter

from mdi.gateway.engine import TextEngine
from mdi.gateway.openai import chat, completions, models


def router(engine: TextEngine, aliases: Sequence[str], timeout_s: float | None) -> APIRouter:
    routes = APIRouter(prefix="/v1")
    served = models.ServedModel(engine.model_name, aliases)
    routes.include_router(models.router(served))
    routes.include_router(chat.router(engine, served, timeout_s))
    routes.include_router(completions.router(engine, served, timeout_s))
    return routes
