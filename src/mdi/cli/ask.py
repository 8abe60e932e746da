"""`mdi ask`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from mdi.cli.options import EngineOptions, Images, LimitOptions, Model, Videos, grouped
from mdi.cli.screen import out, say
from mdi.core.errors import InputError

if TYPE_CHECKING:
    from mdi.core.sampling import SamplingParams
    from mdi.engine import Engine


@grouped
def ask(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="The question; FILE:questions.txt asks one per paragraph.")],
    options: EngineOptions,
    limits: LimitOptions,
    image: Images = None,
    video: Videos = None,
    n_samples: Annotated[int, typer.Option(help="Independent answers to each question.")] = 1,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", "--n-tokens", help="Longest answer, in tokens.")
    ] = 256,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest tokens that make up p.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answer.")] = None,
) -> None:
    """Ask a question about images and videos, and print the answer as it comes."""
    from mdi.core.sampling import SamplingParams

    params = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, n=n_samples
    )
    questions = _questions(prompt)
    with options.start(model, **asdict(limits)) as engine:
        for question in questions:
            _print_answers(engine, user_message(question, image or [], video or []), params)


def user_message(question: str, images: Sequence[str], videos: Sequence[str]) -> list[dict[str, Any]]:
    """A conversation of one message: the media, then the question."""
    if not images and not videos:
        return [{"role": "user", "content": question}]
    parts = [{"type": "image", "image": image} for image in images]
    parts += [{"type": "video", "video": video} for video in videos]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def _questions(prompt: str) -> list[str]:
    if not prompt.startswith("FILE:"):
        return [prompt]
    path = Path(prompt.removeprefix("FILE:"))
    if not path.is_file():
        raise InputError(f"there is no file {str(path)!r} with questions", "prompt")
    paragraphs = [text.strip() for text in path.read_text(encoding="utf-8").split("\n\n")]
    return [text for text in paragraphs if text]


def _print_answers(engine: Engine, messages: list[dict[str, Any]], params: SamplingParams) -> None:
    if params.n == 1:
        for piece in engine.stream(messages, params):
            out.file.write(piece.text)  # as it is: `print` would turn tabs into spaces
            out.file.flush()
        out.print()
        return
    for index, sample in enumerate(engine.chat(messages, params).samples):
        say(Text.assemble((f"[{index + 1}]", "bold"), f" {sample.text}"))
