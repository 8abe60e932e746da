"""instructor: models by tools and by schemas, whole and streamed, of texts and pictures."""

from __future__ import annotations

from typing import Any, Literal

import instructor
import pytest
from openai import OpenAI
from pydantic import BaseModel

QUESTION: Any = [{"role": "user", "content": "Which shape is it, and which color?"}]


class Seen(BaseModel):
    shape: Literal["circle", "star"]
    color: Literal["red", "blue"]


@pytest.fixture(scope="module")
def openai_client(base_url: str, key: str) -> OpenAI:
    return OpenAI(base_url=base_url, api_key=key, max_retries=0)


@pytest.mark.parametrize("mode", [instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA], ids=str)
def test_answers_are_models(openai_client: OpenAI, mode: Any) -> None:
    client = instructor.from_openai(openai_client, mode=mode)
    seen, raw = client.chat.completions.create_with_completion(
        model="bundled", messages=QUESTION, response_model=Seen, temperature=0, max_retries=0
    )
    assert isinstance(seen, Seen)
    assert raw.usage.completion_tokens > 0
    partials = list(
        client.chat.completions.create_partial(
            model="bundled", messages=QUESTION, response_model=Seen, temperature=0, max_retries=0
        )
    )
    assert partials[-1].model_dump() == seen.model_dump()


def test_pictures(openai_client: OpenAI, star_url: str) -> None:
    client = instructor.from_openai(openai_client, mode=instructor.Mode.JSON_SCHEMA)
    picture = instructor.Image.from_base64(star_url)
    seen = client.chat.completions.create(
        model="bundled",
        messages=[{"role": "user", "content": ["Which shape is it?", picture]}],  # type: ignore[typeddict-item]
        response_model=Seen,
        temperature=0,
        max_retries=0,
    )
    assert isinstance(seen, Seen)
