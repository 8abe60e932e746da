"""The questions of `mdi demo`, about images and videos that ship with the package."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SAMPLES = Path(__file__).parents[1] / "assets" / "samples"


@dataclass(frozen=True)
class SampleQuestion:
    """A question about one image, two, or a video."""

    question: str
    truth: str
    media: tuple[Path, ...]

    def messages(self) -> list[dict[str, Any]]:
        """The question in the chat form."""
        kinds = [("video" if path.suffix == ".mp4" else "image", path) for path in self.media]
        parts: list[dict[str, Any]] = [{"type": kind, kind: str(path)} for kind, path in kinds]
        return [{"role": "user", "content": [*parts, {"type": "text", "text": self.question}]}]


@dataclass(frozen=True)
class AnsweredQuestion:
    """A sample with the model's answer."""

    sample: SampleQuestion
    text: str
    seconds: float

    @property
    def right(self) -> bool:
        return self.text == self.sample.truth


@dataclass(frozen=True)
class StructuredSample:
    """A question about images to be answered in JSON of a schema."""

    question: str
    media: tuple[Path, ...]
    schema: dict[str, Any]
    truth: dict[str, Any]


@dataclass(frozen=True)
class CalledSample:
    """A request that a tool fits. call: its name and arguments; result: what it returns; truth: the answer then."""

    question: str
    media: tuple[Path, ...]
    tools: list[dict[str, Any]]
    call: dict[str, Any]
    result: str
    truth: str


def agent_samples() -> tuple[StructuredSample, CalledSample]:
    """What an agent asks for; they ship with the package."""
    entries = json.loads((SAMPLES / "agent.json").read_text(encoding="utf-8"))
    for entry in entries.values():
        entry["media"] = tuple(SAMPLES / name for name in entry["media"])
    return StructuredSample(**entries["structured"]), CalledSample(**entries["called"])


def sample_questions() -> list[SampleQuestion]:
    """The samples that ship with the package."""
    entries = json.loads((SAMPLES / "samples.json").read_text(encoding="utf-8"))
    return [
        SampleQuestion(entry["question"], entry["truth"], tuple(SAMPLES / name for name in entry["media"]))
        for entry in entries
    ]
