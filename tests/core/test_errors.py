from __future__ import annotations

from typing import Annotated, Any

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mdi.core.errors import invalid


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid")

    size: Annotated[int, Field(strict=True, ge=1)]


class Given(BaseModel):
    parts: list[Part]


@pytest.mark.parametrize(
    ("part", "field", "message"),
    [
        ({"size": 0}, "parts[1].size", "parts[1].size should be greater than or equal to 1, got 0"),
        ({"size": "1" * 99}, "parts[1].size", "parts[1].size should be a valid integer"),
        ({}, "parts[1].size", "parts[1].size is missing"),
        ({"size": 1, "colour": 2}, "parts[1].colour", "unknown field parts[1].colour"),
    ],
)
def test_findings_become_sentences_that_name_the_field(part: Any, field: str, message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Given.model_validate({"parts": [{"size": 1}, part]})
    error = invalid(caught.value.errors())
    assert (error.field, str(error)) == (field, message)
