"""`mdi demo`: the bundled model over three local nodes answers questions about sample images, and calls a tool.

Needs no network. The samples are the first held-out ones of every skill (training/sample_images.py): no training image
is among them.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from mdi.cli.sample_questions import AnsweredQuestion, SampleQuestion, sample_questions
from mdi.cli.screen import out, say
from mdi.core.errors import ConfigError
from mdi.core.tables import UncutTable

if TYPE_CHECKING:
    from mdi.cli.demo_agent import AgentStep
    from mdi.engine import Engine

N_NODES = 3
SHEET = "answers.png"


def demo(
    out_folder: Annotated[Path, typer.Option("--out", help="Folder for the pictures with their answers.")] = Path(
        "demo-output"
    ),
) -> None:
    """Three local nodes and the bundled model answer questions about sample images, and call a tool; no network."""
    from mdi.checkpoint.bundled import BUNDLED
    from mdi.cli.contact_sheet import contact_sheet
    from mdi.cli.demo_agent import agent_steps
    from mdi.engine import Engine
    from mdi.rpc.tls import encryption_enabled

    sheet = out_folder / SHEET
    _check_writable(sheet)
    started = time.perf_counter()
    with Engine(BUNDLED, n_nodes=N_NODES, encryption=encryption_enabled()) as engine:
        out.print(f"{N_NODES} nodes with one model between them, started in {time.perf_counter() - started:.1f} s\n")
        answers = [_ask(engine, sample) for sample in sample_questions()]
        steps = agent_steps(engine)
        nodes = UncutTable("node", "layers", "process", "memory")
        for node in engine.nodes():
            layers = f"{node.first_layer}-{node.last_layer - 1}"
            nodes.add_row(node.name, layers, str(node.pid), f"{node.resident_bytes / 1e6:,.0f} MB")
    out.print(_answers_table(answers))
    n_right = sum(answer.right for answer in answers)
    out.print(f"{n_right} of {len(answers)} answers are right; the model has 5 million parameters.\n")
    out.print(_steps_table(steps))
    out.print(nodes)
    contact_sheet(answers).save(sheet)
    say(f"\nThe pictures and the answers: {sheet}")
    say('With a real model: mdi ask Qwen/Qwen2-VL-2B-Instruct "What is this?" --image cat.jpg')


def _check_writable(sheet: Path) -> None:
    try:
        sheet.parent.mkdir(parents=True, exist_ok=True)
        sheet.open("ab").close()
    except OSError as error:
        raise ConfigError(f"{str(sheet)!r} cannot be written ({error.strerror}): choose another --out") from None


def _ask(engine: Engine, sample: SampleQuestion) -> AnsweredQuestion:
    from mdi.core.sampling import SamplingParams

    started = time.perf_counter()
    completion = engine.chat(sample.messages(), SamplingParams(temperature=0, max_tokens=64))
    return AnsweredQuestion(sample, completion.text, time.perf_counter() - started)


def _answers_table(answers: list[AnsweredQuestion]) -> UncutTable:
    table = UncutTable("question", "answer", "truth", "seconds")
    for answer in answers:
        text = Text(answer.text, "green" if answer.right else "red")
        table.add_row(answer.sample.question, text, answer.sample.truth, f"{answer.seconds:.2f}")
    return table


def _steps_table(steps: list[AgentStep]) -> UncutTable:
    table = UncutTable("what an agent does", "over the OpenAI API")
    for step in steps:
        table.add_row(step.speaker, Text(step.text, {True: "green", False: "red", None: ""}[step.right]))
    return table
