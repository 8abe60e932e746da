"""The sample questions that ship with the package: the first held-out ones of every skill, chosen before any answer.

    python -m training.sample_images

Writes src/mdi/assets/samples/: PNG stills, MP4 films, samples.json, and agent.json: the first question whose answer has
more than one key, and the first request to look something up.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from training.held_out import JSON, TOOLS, Exam, exams
from training.tool_calls import DONE, FAILED, read_result

FOLDER = Path(__file__).parents[1] / "src" / "mdi" / "assets" / "samples"
CHOSEN = {
    "shape": 1, "color": 1, "exists": 1, "count": 1, "position": 2, "read": 2, "describe": 1, "compare": 1,
    "motion": 1, "change": 1,
}  # fmt: skip


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    samples = []
    for skill, count in CHOSEN.items():
        for index, exam in enumerate(exams(skill, count), start=1):
            media = _written(exam, f"{skill}-{index}")
            samples.append({"question": exam.question.text, "truth": exam.question.answer, "media": media})
    _write("samples.json", samples)
    _write("agent.json", {"structured": _structured(), "called": _called()})


def _structured() -> dict[str, Any]:
    exam = next(exam for exam in exams(JSON, 100) if len(json.loads(exam.question.answer)) > 1)
    truth, media = json.loads(exam.question.answer), _written(exam, "json-1")
    return {"question": exam.question.text, "schema": exam.schema, "truth": truth, "media": media}


def _called() -> dict[str, Any]:
    exam = next(exam for exam in exams(TOOLS, 100) if exam.call and exam.question.answer not in (DONE, FAILED))
    told = {"result": read_result(exam.question.text), "truth": exam.question.answer}
    return {
        "question": exam.request,
        "tools": exam.tools,
        "call": exam.call,
        **told,
        "media": _written(exam, "tools-1"),
    }


def _written(exam: Exam, name: str) -> list[str]:
    """Writes its media; their names."""
    media = {f"{name}-{nth}.png": data for nth, data in enumerate(exam.images, start=1)}
    if exam.video is not None:
        media[f"{name}.mp4"] = exam.video
    for file, data in media.items():
        (FOLDER / file).write_bytes(data)
    return list(media)


def _write(name: str, content: Any) -> None:
    (FOLDER / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
