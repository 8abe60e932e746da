"""The bundled model's right answers, over HTTP and three nodes: every skill, on held-out scenes.

    pip install -e '.[training]'
    python -m benchmarks.quality                     # 300 questions a skill, all 9,673 of easy-vqa's test split
    python -m benchmarks.quality --quantization int8 # the same with int8 weights
    python -m benchmarks.quality --compare 1000      # and how many answers are transformers' own, in float32
    python -m benchmarks.quality --skills json,tools # only these

An answer counts when it is exactly the true one. In `json` a schema is given, and the values count; in `tools` a third
are calls, which count by name and arguments, and the others what is said after a result, or where no tool fits.
`ended` is the share of answers that ended by themselves.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
from rich.console import Console
from rich.progress import Progress, TaskID, track
from rich.table import Table
from testing.processes import serving
from training.held_out import EASY_VQA, JSON, TOOLS, Exam, all_skills, easy_vqa_exams, exams

from mdi.bench.peers import Transformers
from mdi.checkpoint.hub import locate
from mdi.checkpoint.source import open_source

MAX_TOKENS = 64
AT_ONCE = 16
SKILLS = (*all_skills(), JSON, TOOLS)
TARGET = 0.98
console = Console()


@dataclass
class Score:
    """Of one skill. right, ended: shares of the questions."""

    skill: str
    questions: int
    right: float
    ended: float


@dataclass(frozen=True)
class Answer:
    """calls: names and arguments."""

    exam: Exam
    text: str
    calls: list[dict[str, Any]]
    ended: bool

    @property
    def right(self) -> bool:
        return self.exam.right(self.text, self.calls)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--n-nodes", type=int, default=3)
    parser.add_argument("--quantization", choices=["int8", "int4"], help="of layers, head and vision tower")
    parser.add_argument("--per-skill", type=int, default=300)
    parser.add_argument("--skills", default=",".join(SKILLS), help="names with commas between them (all)")
    parser.add_argument("--easy-vqa", type=int, help="questions of easy-vqa's test split (all of them)")
    parser.add_argument("--compare", type=int, help="ask so many questions, here and of transformers, in float32")
    parser.add_argument("--json", type=Path, help="write the table there, too")
    parser.add_argument("--errors", type=int, default=0, help="wrong answers to show a skill")
    options = parser.parse_args()
    if options.compare:
        compare(options.model, options.n_nodes, options.compare)
    else:
        examine(options)


def examine(options: argparse.Namespace) -> None:
    """Prints the share of right answers by skill."""
    chosen = {
        skill: list(easy_vqa_exams(options.easy_vqa) if skill == EASY_VQA else exams(skill, options.per_skill))
        for skill in options.skills.split(",")
    }
    started = time.perf_counter()
    format_ = options.quantization
    quantized = ("--quantization", format_, "--vision-quantization", format_) if format_ else ()
    with serving(options.model, "--n-nodes", str(options.n_nodes), *quantized) as (_, url):
        answers = asyncio.run(ask_all(url, chosen))
    scores = [score(skill, given) for skill, given in answers.items()]
    show(scores)
    n_questions = sum(score.questions for score in scores)
    console.print(f"{n_questions} questions over {options.n_nodes} nodes in {time.perf_counter() - started:.0f} s")
    for given in answers.values():
        for answer in islice((answer for answer in given if not answer.right), options.errors):
            question = answer.exam.question
            console.print(f"{question.skill}: {question.text!r} -> {answer.text!r}, not {question.answer!r}")
    if options.json:
        options.json.write_text(json.dumps([asdict(score) for score in scores], indent=2) + "\n")


def compare(model: str, n_nodes: int, n_questions: int) -> None:
    """Prints how many answers are equal to those of transformers."""
    per_skill = -(-n_questions // len(all_skills()))
    chosen = {skill: list(exams(skill, per_skill)) for skill in all_skills()}
    with (
        TemporaryDirectory() as folder,  # where chunks of another dtype cannot be
        serving(model, "--n-nodes", str(n_nodes), "--dtype", "float32", "--ckpt-folder", folder) as (_, url),
    ):
        answers = asyncio.run(ask_all(url, chosen))
    oracle = Transformers(open_source(locate(model, ckpt_folder=Path("checkpoints"))))
    all_answers = [answer for given in answers.values() for answer in given]
    different = []
    for answer in track(all_answers, "transformers", console=console):
        theirs = oracle.text(answer.exam.messages(), MAX_TOKENS)
        if theirs != answer.text:
            different.append(f"{answer.exam.question.text!r}: {answer.text!r} here, {theirs!r} there")
    console.print(*different, sep="\n")
    equal = len(all_answers) - len(different)
    console.print(
        f"{equal} of {len(all_answers)} answers ({equal / len(all_answers):.2%}) are transformers' own, float32"
    )


async def ask_all(url: str, chosen: dict[str, list[Exam]]) -> dict[str, list[Answer]]:
    limit = asyncio.Semaphore(AT_ONCE)
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        with Progress(console=console) as progress:
            asked = {}
            for skill, some in chosen.items():
                task = progress.add_task(skill, total=len(some))

                async def answered(exam: Exam, task: TaskID = task) -> Answer:
                    async with limit:
                        answer = await ask(client, model, exam)
                    progress.advance(task)
                    return answer

                asked[skill] = list(await asyncio.gather(*map(answered, some)))
            return asked


async def ask(client: httpx.AsyncClient, model: str, exam: Exam) -> Answer:
    body = {"model": model, "messages": openai_messages(exam), "max_tokens": MAX_TOKENS, "temperature": 0}
    if exam.schema is not None:
        json_schema = {"name": "answer", "schema": exam.schema, "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": json_schema}
    if exam.tools:
        body["tools"] = exam.tools
    response = await client.post("/v1/chat/completions", json=body)
    response.raise_for_status()
    choice = response.json()["choices"][0]
    message = choice["message"]
    functions = [call["function"] for call in message.get("tool_calls") or ()]
    calls = [{"name": function["name"], "arguments": json.loads(function["arguments"])} for function in functions]
    return Answer(exam, message["content"] or "", calls, choice["finish_reason"] in ("stop", "tool_calls"))


def openai_messages(exam: Exam) -> list[dict[str, Any]]:
    user, *others = exam.messages()
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": data_url("image/png", image)}} for image in exam.images
    ]
    if exam.video is not None:
        parts.append({"type": "video_url", "video_url": {"url": data_url("video/mp4", exam.video)}})
    return [user | {"content": [*parts, user["content"][-1]]}, *others]


def data_url(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def score(skill: str, answers: Sequence[Answer]) -> Score:
    n = len(answers)
    right, ended = sum(answer.right for answer in answers) / n, sum(answer.ended for answer in answers) / n
    return Score(skill, n, round(right, 4), round(ended, 4))


def show(scores: Sequence[Score]) -> None:
    table = Table("skill", "questions", f"right (target {TARGET:.0%})", "ended")
    for row in scores:
        met = "green" if row.right >= TARGET else "red"
        table.add_row(row.skill, str(row.questions), f"[{met}]{row.right:.1%}[/]", f"{row.ended:.1%}")
    console.print(table)


if __name__ == "__main__":
    main()
