"""POST /v1/embeddings, which is refused: the served model generates text."""

from __future__ import annotations

from fastapi import APIRouter

from mdi.core.errors import InputError
from mdi.gateway.openai.models import ServedModel


def router(served: ServedModel) -> APIRouter:
    routes = APIRouter(include_in_schema=False)  # it has no answer to describe

    @routes.post("/embeddings")
    async def embeddings() -> None:
        raise InputError(
            f"{served.name} generates text and gives no embeddings: ask a server of an embedding model", "model"
        )

    return routes
