"""The sample questions that ship with the package: the first held-out ones of every skill, chosen before any answer.

    python -m training.sample_images

Writes src/mdi/assets/samples/: PNG stills, MP4 films, and samples.json.
"""

from __future__ import annotations

import json
from pathlib import Path

from training.held_out import exams

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
            media = [(f"{skill}-{index}-{nth}.png", data) for nth, data in enumerate(exam.images, start=1)]
            if exam.video is not None:
                media.append((f"{skill}-{index}.mp4", exam.video))
            for name, data in media:
                (FOLDER / name).write_bytes(data)
            names = [name for name, _ in media]
            samples.append({"question": exam.question.text, "truth": exam.question.answer, "media": names})
    (FOLDER / "samples.json").write_text(json.dumps(samples, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
