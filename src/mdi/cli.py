"""The commands. Each builds one configuration and calls one function; errors become exit codes here and nowhere else.

Exit codes: 0 done, 2 for what the caller can mend (input, options, checkpoints), 1 for everything else.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from mdi.errors import CheckpointError, ConfigError, InputError, MDIError
from mdi.params import SamplingParams

if TYPE_CHECKING:  # torch takes seconds to import: commands import what they need when they run
    from mdi.engine import Engine

app = typer.Typer(
    name="mdi",
    help="One vision-language model over the machines you already have.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out = Console()
err = Console(stderr=True)

Model = Annotated[str, typer.Argument(help="A checkpoint's folder, or its name on the Hugging Face hub.")]
CkptFolder = Annotated[Path, typer.Option(help="Where checkpoints from the hub are kept.")]
HfToken = Annotated[str | None, typer.Option(envvar="HF_TOKEN", help="Access token for gated checkpoints.")]
NNodes = Annotated[int, typer.Option("--n-nodes", min=1, help="Nodes the layers are split over.")]
Layers = Annotated[str | None, typer.Option(help="Layers per node, overriding the plan: 10,10,8.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; the checkpoint's own if not given.")]
Device = Annotated[str, typer.Option(help="Where this node computes: cpu, cuda, cuda:1, mps.")]
SequenceLength = Annotated[int | None, typer.Option(help="Most tokens of prompt and answer together.")]
Images = Annotated[list[str] | None, typer.Option("--image", help="Path, URL or data: URL; may be repeated.")]
Videos = Annotated[list[str] | None, typer.Option("--video", help="Path, URL or data: URL; may be repeated.")]
MaxPixels = Annotated[int | None, typer.Option(help="Largest area an image is given, in pixels (784 make a token).")]
MinPixels = Annotated[int | None, typer.Option(help="Smallest area an image is given, in pixels.")]
CHECKPOINTS = Path("checkpoints")


def main() -> None:
    """Entry point of `mdi` and `python -m mdi`."""
    try:
        app()
    except (InputError, ConfigError, CheckpointError) as error:
        err.print(f"[bold red]error:[/] {error}", highlight=False, markup=True, soft_wrap=True)
        sys.exit(2)
    except MDIError as error:
        err.print(f"[bold red]error:[/] {error}", highlight=False, markup=True, soft_wrap=True)
        sys.exit(1)


@app.command()
def prepare(
    model: Model,
    n_nodes: NNodes = 1,
    dtype: Dtype = None,
    layers: Layers = None,
    ckpt_folder: CkptFolder = CHECKPOINTS,
    skip_convert: Annotated[
        bool, typer.Option("--skip-convert", help="Download nothing: the checkpoint is here.")
    ] = False,
    hf_token: HfToken = None,
) -> None:
    """Split a checkpoint into one chunk per node, under chunks/{n}nodes/ in its folder."""
    from mdi.checkpoint.prepare import prepare as write_chunks
    from mdi.checkpoint.source import Source, locate

    source = Source.open(locate(model, ckpt_folder=ckpt_folder, hf_token=hf_token, download=not skip_convert))
    with _bytes_bar() as progress:
        task = progress.add_task("writing chunks", total=None)
        folder = write_chunks(
            source,
            n_nodes,
            dtype=dtype,
            layers=_parse_layers(layers),
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    out.print(f"{n_nodes} chunk{'s' * (n_nodes > 1)} in {folder}", soft_wrap=True)


@app.command()
def plan(
    model: Model,
    n_nodes: NNodes = 1,
    layers: Layers = None,
    dtype: Dtype = None,
    ckpt_folder: CkptFolder = CHECKPOINTS,
    hf_token: HfToken = None,
) -> None:
    """Show which layers would go to which node, and what each would hold, before anything is loaded."""
    from mdi.checkpoint.plan import make_plan, role_names, stage_summary
    from mdi.checkpoint.source import Source, locate

    config = Source.open(locate(model, ckpt_folder=ckpt_folder, hf_token=hf_token)).model_config
    table = Table("node", "layers", "holds", "parameters", "size", "share of a step")
    made = make_plan(config, n_nodes, _parse_layers(layers))
    for name, spec in zip(role_names(n_nodes), made.stages, strict=True):
        summary = stage_summary(config, spec, dtype or config.dtype)
        parts = [("embedding", spec.embedding), ("vision", spec.vision), ("LM head", spec.head)]
        table.add_row(
            name,
            f"{spec.first_layer}-{spec.last_layer - 1} ({len(spec.layers)})",
            ", ".join(part for part, held in parts if held) or "-",
            f"{summary.parameters:,}",
            f"{summary.size_bytes / 1e6:,.0f} MB",
            f"{summary.step_share:.0%}",
        )
    out.print(table)


@app.command()
def serve(
    model: Annotated[str | None, typer.Argument(help="A checkpoint's folder, or its name on the hub.")] = None,
    ckpt: Annotated[str | None, typer.Option(help="The same as the argument.")] = None,
    host: Annotated[str, typer.Option(help="Address the HTTP server binds.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the HTTP server; 0 picks a free one.")] = 8000,
    n_nodes: NNodes = 1,
    layers: Layers = None,
    dtype: Dtype = None,
    device: Device = "cpu",
    sequence_length: SequenceLength = None,
    max_sequences: Annotated[int, typer.Option(min=1, help="Samples that run at once; more wait.")] = 16,
    min_pixels: MinPixels = None,
    max_pixels: MaxPixels = None,
    media_dir: Annotated[Path | None, typer.Option(help="Requests may name files in this folder.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="MDI_API_KEY", help="Key that requests must bring.")] = None,
    recovery_timeout: Annotated[float, typer.Option(help="Seconds that requests wait for lost nodes.")] = 120,
    ckpt_folder: CkptFolder = CHECKPOINTS,
    hf_token: HfToken = None,
) -> None:
    """Serve a model over HTTP: OpenAI's routes, /generate and /generate/multimodal."""
    if (model is None) == (ckpt is None):
        raise ConfigError("name one checkpoint: mdi serve CHECKPOINT")
    from mdi.cluster.recovery import RecoveryLimits
    from mdi.gateway.app import GatewayConfig, bind
    from mdi.gateway.app import serve as serve_http
    from mdi.media import MediaPolicy

    config = GatewayConfig(api_key=api_key)
    recovery_limits = RecoveryLimits(timeout_s=recovery_timeout)
    with (
        bind(host, port) as bound,
        _engine(
            model or ckpt or "",
            n_nodes=n_nodes,
            layers=_parse_layers(layers),
            dtype=dtype,
            device=device,
            sequence_length=sequence_length,
            max_sequences=max_sequences,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
            media=MediaPolicy(media_dir=media_dir),
            recovery_limits=recovery_limits,
            ckpt_folder=ckpt_folder,
            hf_token=hf_token,
        ) as engine,
    ):
        _print_nodes(engine)
        serve_http(engine, bound, config)


@app.command()
def secondary(
    chunk: Annotated[Path, typer.Option(help="The node's chunk, as `mdi prepare` wrote it.")],
    listen: Annotated[str, typer.Option(help="Address to listen at; port 0 picks a free one.")] = "127.0.0.1:0",
    dtype: Dtype = None,
    device: Device = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads to compute with.")] = None,
    with_parent: Annotated[bool, typer.Option("--with-parent", help="End when standard input ends.")] = False,
    insecure: Annotated[bool, typer.Option("--insecure", help="Allow unencrypted links beyond this machine.")] = False,
) -> None:
    """Run one node: a secondary, or the finisher, whichever its chunk is."""
    from mdi.pipeline.node import serve_node

    serve_node(
        chunk,
        listen=listen,
        device=device,
        dtype=dtype,
        threads=threads,
        with_parent=with_parent,
        insecure=insecure,
    )


@app.command()
def ask(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="The question; FILE:questions.txt asks one per paragraph.")],
    image: Images = None,
    video: Videos = None,
    n_nodes: NNodes = 1,
    n_samples: Annotated[int, typer.Option(help="Independent answers to each question.")] = 1,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", "--n-tokens", help="Longest answer, in tokens.")
    ] = 256,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest tokens that make up p.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answer.")] = None,
    layers: Layers = None,
    dtype: Dtype = None,
    device: Device = "cpu",
    sequence_length: SequenceLength = None,
    min_pixels: MinPixels = None,
    max_pixels: MaxPixels = None,
    ckpt_folder: CkptFolder = CHECKPOINTS,
    hf_token: HfToken = None,
) -> None:
    """Ask a question about images and videos, and print the answer as it comes."""
    params = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, n=n_samples
    )
    questions = _questions(prompt)
    engine = _engine(
        model,
        n_nodes=n_nodes,
        layers=_parse_layers(layers),
        dtype=dtype,
        device=device,
        sequence_length=sequence_length,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        ckpt_folder=ckpt_folder,
        hf_token=hf_token,
    )
    with engine:
        for question in questions:
            _print_answers(engine, _messages(question, image or [], video or []), params)


@app.command()
def verify(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="The question to compare on.")] = "Describe this.",
    image: Images = None,
    video: Videos = None,
    n_nodes: NNodes = 1,
    dtype: Annotated[str, typer.Option(help="What both sides compute in.")] = "float32",
    max_tokens: Annotated[int, typer.Option(min=1, help="Greedy tokens to compare.")] = 16,
    ckpt_folder: CkptFolder = CHECKPOINTS,
    hf_token: HfToken = None,
) -> None:
    """Run one prompt through transformers and through this system, and show how far apart they are."""
    from mdi.checkpoint.source import Source, locate
    from mdi.verify import verify as compare

    source = Source.open(locate(model, ckpt_folder=ckpt_folder, hf_token=hf_token))
    report = compare(
        source, _messages(prompt, image or [], video or []), dtype=dtype, n_nodes=n_nodes, max_tokens=max_tokens
    )
    if not report.same_prompt:
        out.print("the prompts differ: transformers tokenises or resizes this differently")
        raise typer.Exit(1)
    table = Table("position", "largest logit difference", title=f"{dtype}, {n_nodes} node(s)")
    for position, difference in enumerate(report.differences):
        table.add_row(str(position), f"{difference:.3g}")
    out.print(table)
    out.print(f"largest difference relative to the largest logit: {report.relative:.3g}; cosine {report.cosine:.7f}")
    if report.first_difference is None:
        out.print(f"all {len(report.ours)} greedy tokens are equal")
    else:
        index = report.first_difference
        out.print(
            f"first differing token: {index} "
            f"(transformers {report.theirs[index : index + 1]}, here {report.ours[index : index + 1]})"
        )
        raise typer.Exit(1)


@app.command()
def demo() -> None:
    """Three local nodes and a small random model answer questions about a picture; no network needed."""
    from mdi.demo import run

    run(out)


def _engine(model: str, **options: Any) -> Engine:
    """Loads a model, with a bar per node."""
    from mdi.engine import Engine

    with _bytes_bar() as progress:
        tasks: dict[str, Any] = {}

        def show(node: str, done: int, total: int) -> None:
            if node not in tasks:
                tasks[node] = progress.add_task(node, total=total)
            progress.update(tasks[node], completed=done, total=total)

        return Engine(model, progress=show, **options)


@contextmanager
def _bytes_bar() -> Iterator[Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        yield progress


def _print_nodes(engine: Engine) -> None:
    table = Table("node", "layers", "dtype", "device", "memory", title=engine.model_name)
    for node in engine.nodes():
        table.add_row(
            node.name,
            f"{node.first_layer}-{node.last_layer - 1}",
            node.dtype,
            node.device,
            f"{node.resident_bytes / 1e6:,.0f} MB",
        )
    err.print(table)


def _print_answers(engine: Engine, messages: list[dict[str, Any]], params: SamplingParams) -> None:
    if params.n == 1:
        for piece in engine.stream(messages, params):
            out.print(piece.text, end="", markup=False, highlight=False, soft_wrap=True)
        out.print()
        return
    for index, sample in enumerate(engine.chat(messages, params).samples):
        out.print(f"[bold]\\[{index + 1}][/] ", end="")
        out.print(sample.text, markup=False, highlight=False, soft_wrap=True)


def _messages(question: str, images: list[str], videos: list[str]) -> list[dict[str, Any]]:
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


def _parse_layers(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(
            f"--layers takes whole numbers with commas between them, like 10,10,8; got {text!r}"
        ) from None
