"""The commands. Each builds one configuration and calls one function; errors become exit codes here and nowhere else.

Exit codes: 0 done, 2 for what the caller can mend (input, options, checkpoints), 1 for everything else.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from mdi.core.errors import CheckpointError, ConfigError, InputError, MDIError
from mdi.core.sampling import SamplingParams

if TYPE_CHECKING:  # torch takes seconds to import: commands import what they need when they run
    from mdi.cluster.launchers.manual import Presence
    from mdi.cluster.measure import MeasuredNode
    from mdi.cluster.nodes_config import NodesConfig
    from mdi.engine import Engine
    from mdi.models.weights import StageSpec
    from mdi.planning.hardware import Machine
    from mdi.planning.plan import StageSummary

app = typer.Typer(
    name="mdi",
    help="One vision-language model over the machines you already have.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out = Console()
err = Console(stderr=True)

Model = Annotated[str, typer.Argument(help="A checkpoint's folder, its name on the Hugging Face hub, or: bundled.")]
CkptFolder = Annotated[Path, typer.Option(help="Where checkpoints from the hub are kept.")]
HfToken = Annotated[str | None, typer.Option(envvar="HF_TOKEN", help="Access token for gated checkpoints.")]
NNodes = Annotated[int, typer.Option("--n-nodes", min=1, help="Nodes the layers are split over.")]
Layers = Annotated[str | None, typer.Option(help="Layers per node, overriding the plan: 10,10,8.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; the checkpoint's own if not given.")]
Device = Annotated[str | None, typer.Option(help="Where this node computes: cpu (the default), cuda, cuda:1, mps.")]
SequenceLength = Annotated[int | None, typer.Option(help="Most tokens of prompt and answer together.")]
MaxSequences = Annotated[int, typer.Option(min=1, help="Samples that run at once; more wait.")]
Images = Annotated[list[str] | None, typer.Option("--image", help="Path, URL or data: URL; may be repeated.")]
Videos = Annotated[list[str] | None, typer.Option("--video", help="Path, URL or data: URL; may be repeated.")]
MaxPixels = Annotated[int | None, typer.Option(help="Largest area an image is given, in pixels (784 make a token).")]
MinPixels = Annotated[int | None, typer.Option(help="Smallest area an image is given, in pixels.")]
NodesJson = Annotated[
    Path | None, typer.Option("--nodes-config", help="JSON file with all nodes, each started by hand on its machine.")
]
WaitS = Annotated[float, typer.Option(help="Seconds to wait for nodes started by hand.")]
Certs = Annotated[Path, typer.Option(help="Folder with this node's certificate, for ENABLE_ENCRYPTION=1.")]
Insecure = Annotated[bool, typer.Option("--insecure", help="Allow unencrypted links beyond this machine.")]
CHECKPOINTS = Path("checkpoints")
CERTS = Path("certs")


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
    vision_node: Annotated[
        bool, typer.Option("--vision-node", help="One chunk more: the vision tower, for a node of its own.")
    ] = False,
    ckpt_folder: CkptFolder = CHECKPOINTS,
    skip_convert: Annotated[
        bool, typer.Option("--skip-convert", help="Download nothing: the checkpoint is here.")
    ] = False,
    hf_token: HfToken = None,
) -> None:
    """Split a checkpoint into one chunk per node, under chunks/{n}nodes/ in its folder."""
    from mdi.checkpoint.hub import locate
    from mdi.checkpoint.prepare import prepare as write_chunks
    from mdi.checkpoint.source import open_source

    source = open_source(locate(model, ckpt_folder=ckpt_folder, hf_token=hf_token, download=not skip_convert))
    with _bytes_bar() as progress:
        task = progress.add_task("writing chunks", total=None)
        folder = write_chunks(
            source,
            n_nodes,
            dtype=dtype,
            layers=_parse_layers(layers),
            vision_node=vision_node,
            progress=lambda _what, done, total: progress.update(task, completed=done, total=total),
        )
    n_chunks = n_nodes + vision_node
    out.print(f"{n_chunks} chunk{'s' * (n_chunks > 1)} in {folder}", soft_wrap=True)


@app.command()
def plan(
    model: Model,
    n_nodes: NNodes = 1,
    nodes_config: NodesJson = None,
    certs: Certs = CERTS,
    insecure: Insecure = False,
    layers: Layers = None,
    dtype: Dtype = None,
    sequence_length: SequenceLength = None,
    max_sequences: MaxSequences = 16,
    ckpt_folder: CkptFolder = CHECKPOINTS,
    hf_token: HfToken = None,
) -> None:
    """Show which layers would go to which node, and what each would hold, before anything is loaded.

    With --nodes-config, nodes that run are asked what their machines can do, and get what these can carry.
    """
    from mdi.checkpoint.hub import locate
    from mdi.checkpoint.source import open_source
    from mdi.cluster.nodes_config import NodesConfig
    from mdi.engine.engine import sequence_length_of
    from mdi.planning.plan import make_plan, stage_summary

    config = open_source(locate(model, ckpt_folder=ckpt_folder, hf_token=hf_token)).model_config
    chosen, dtype = _parse_layers(layers), dtype or config.dtype
    cache_tokens = max_sequences * sequence_length_of(sequence_length, config.max_positions)
    findings, apart = list["MeasuredNode"](), False
    if nodes_config:
        nodes = NodesConfig.read(nodes_config)
        nodes.check_layers(config.n_layers)
        chosen, n_nodes, apart = chosen or nodes.layers, nodes.n_nodes, nodes.vision is not None
        findings = _findings(nodes, certs, insecure, dtype)
    machines = [finding.machine for finding in findings]
    made = make_plan(
        config,
        n_nodes,
        chosen,
        machines=machines,
        dtype=dtype,
        cache_tokens=cache_tokens,
        vision_node=apart,
    )
    rows = [(name, spec, stage_summary(config, spec, dtype, cache_tokens)) for name, spec in made.roles.items()]
    out.print(_machines_table(rows[: made.n_nodes], machines) if machines else _stages_table(rows))
    for name, finding in zip(made.roles, findings, strict=False):
        if finding.unknown:
            out.print(f"{name} was not asked, and is taken to be as fast as this machine: {finding.unknown}")


def _findings(nodes: NodesConfig, certs: Path, insecure: bool, dtype: str) -> list[MeasuredNode]:
    from mdi.cluster.launchers.manual import ManualNodes
    from mdi.cluster.measure import measure_reachable
    from mdi.rpc.tls import encryption_enabled

    manual_nodes = ManualNodes(nodes, certs=certs, insecure=insecure)
    device = nodes.starter.device or "cpu"
    with err.status("measuring the machines, one after the other"):
        return measure_reachable(manual_nodes, manual_nodes.identity(encryption_enabled()), dtype, device)


def _stages_table(rows: Sequence[tuple[str, StageSpec, StageSummary]]) -> Table:
    table = Table("node", "layers", "holds", "parameters", "size", "share of a step")
    for name, spec, summary in rows:
        parts = [("embedding", spec.embedding), ("vision", spec.vision), ("LM head", spec.head)]
        table.add_row(
            name,
            _layers_text(spec),
            ", ".join(part for part, held in parts if held) or "-",
            f"{summary.parameters:,}",
            f"{summary.size_bytes / 1e6:,.0f} MB",
            f"{summary.step_share:.0%}",
        )
    return table


def _machines_table(rows: Sequence[tuple[str, StageSpec, StageSummary]], machines: Sequence[Machine]) -> Table:
    """Time of a token is that of its slowest node once all nodes have work, and that of all nodes for a lone stream."""
    table = Table("node", "layers", "weights", "cache", "room", "reads", "computes", "a token", "1,000 of a prompt")
    for (name, spec, summary), machine in zip(rows, machines, strict=True):
        table.add_row(
            name,
            _layers_text(spec),
            f"{summary.size_bytes / 1e6:,.0f} MB",
            f"{summary.cache_bytes / 1e6:,.0f} MB",
            "?" if math.isinf(machine.memory_bytes) else f"{machine.memory_bytes / 1e9:,.1f} GB",
            f"{machine.bytes_per_s / 1e9:,.1f} GB/s",
            f"{machine.flops_per_s / 1e12:,.2f} TFLOP/s",
            f"{machine.token_s(summary.size_bytes / summary.parameters * summary.step_parameters) * 1e3:,.1f} ms",
            f"{machine.prompt_token_s(summary.step_parameters) * 1e3:,.2f} s",
        )
    return table


def _layers_text(spec: StageSpec) -> str:
    return f"{spec.first_layer}-{spec.last_layer - 1} ({len(spec.layers)})"


@app.command()
def serve(
    model: Annotated[str | None, typer.Argument(help="A checkpoint's folder, or its name on the hub.")] = None,
    ckpt: Annotated[str | None, typer.Option(help="The same as the argument.")] = None,
    host: Annotated[str, typer.Option(help="Address the HTTP server binds.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the HTTP server; 0 picks a free one.")] = 8000,
    n_nodes: NNodes = 1,
    nodes_config: NodesJson = None,
    wait_s: WaitS = 600,
    certs: Certs = CERTS,
    insecure: Insecure = False,
    layers: Layers = None,
    dtype: Dtype = None,
    device: Device = None,
    sequence_length: SequenceLength = None,
    max_sequences: MaxSequences = 16,
    vision_cache_mb: Annotated[
        int, typer.Option(min=0, help="Memory for encoded images and videos, for the next that ask about them.")
    ] = 256,
    min_pixels: MinPixels = None,
    max_pixels: MaxPixels = None,
    media_dir: Annotated[Path | None, typer.Option(help="Requests may name files in this folder.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="MDI_API_KEY", help="Key that requests must bring.")] = None,
    recovery_timeout: Annotated[float, typer.Option(help="Seconds that requests wait for lost nodes.")] = 120,
    spare_after: Annotated[
        float, typer.Option(help="Seconds that a lost node has to come back before a spare takes its place.")
    ] = 5,
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
            nodes_config=nodes_config,
            wait_s=wait_s,
            certs=certs,
            insecure=insecure,
            layers=_parse_layers(layers),
            dtype=dtype,
            device=device,
            sequence_length=sequence_length,
            max_sequences=max_sequences,
            vision_cache_bytes=vision_cache_mb * 2**20,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
            media=MediaPolicy(media_dir=media_dir),
            recovery_limits=recovery_limits,
            spare_after=spare_after,
            ckpt_folder=ckpt_folder,
            hf_token=hf_token,
        ) as engine,
    ):
        _print_nodes(engine)
        serve_http(engine, bound, config)


@app.command()
def secondary(
    index: Annotated[
        int | None, typer.Argument(help="Which node of --nodes-config this is: 0 is the one after the starter.")
    ] = None,
    chunk: Annotated[
        Path | None,
        typer.Option(help="The node's chunk, as `mdi prepare` wrote it; without one, the starter sends it."),
    ] = None,
    nodes_config: NodesJson = None,
    spare: Annotated[
        int | None, typer.Option(help="Which spare of --nodes-config this is: it waits until a node is lost.")
    ] = None,
    vision: Annotated[bool, typer.Option("--vision", help="This is the vision node of --nodes-config.")] = False,
    cache_folder: Annotated[
        Path | None, typer.Option(help="Where chunks from the starter are kept; ~/.cache/mdi/chunks if not given.")
    ] = None,
    listen: Annotated[
        str | None, typer.Option(help="Address to listen at, host:port; without --nodes-config 127.0.0.1:0.")
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads to compute with.")] = None,
    with_parent: Annotated[bool, typer.Option("--with-parent", help="End when standard input ends.")] = False,
    certs: Certs = CERTS,
    insecure: Insecure = False,
) -> None:
    """Run one node: a secondary, the finisher, the vision node or a spare, as the nodes-config or its chunk says.

    With --nodes-config, address, device, dtype and threads are as written there, unless given here.
    """
    from mdi.checkpoint.cache import ChunkCache, default_cache_folder
    from mdi.cluster.nodes_config import NodesConfig
    from mdi.node.server import serve_node
    from mdi.rpc.tls import Identity, encryption_enabled

    if (index is not None) + (spare is not None) + vision != (nodes_config is not None):
        raise ConfigError(
            "name the nodes-config and this node's place in it: mdi secondary --nodes-config FILE 0 "
            "(or --spare 0, or --vision)"
        )
    name, cache, hands_over = chunk.stem.removeprefix("model_") if chunk else "", None, False
    if nodes_config is not None:
        config = NodesConfig.read(nodes_config)
        place = config.spare(spare) if spare is not None else None
        node = place or (config.vision_node if vision else config.node(index or 0))
        if chunk and node.name != name:
            raise ConfigError(f"this is the {node.name}, but {chunk.name} is the chunk of {name}")
        name, listen = node.name, listen or node.address
        device, dtype, threads = device or node.device, dtype or node.dtype, threads or node.threads
        cache, hands_over = ChunkCache(cache_folder or default_cache_folder()), bool(config.spares)
    elif chunk is None:
        raise ConfigError("give this node its chunk, as `mdi prepare` wrote it: --chunk FILE")
    serve_node(
        name,
        chunk,
        listen=listen or "127.0.0.1:0",
        device=device or "cpu",
        dtype=dtype,
        threads=threads,
        with_parent=with_parent,
        insecure=insecure,
        identity=Identity.load(certs, name) if encryption_enabled() else None,
        cache=cache,
        hands_over=hands_over,
        progress=None if with_parent else _NodeProgress(),
    )


@app.command()
def ask(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="The question; FILE:questions.txt asks one per paragraph.")],
    image: Images = None,
    video: Videos = None,
    n_nodes: NNodes = 1,
    nodes_config: NodesJson = None,
    wait_s: WaitS = 600,
    certs: Certs = CERTS,
    insecure: Insecure = False,
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
    device: Device = None,
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
        nodes_config=nodes_config,
        wait_s=wait_s,
        certs=certs,
        insecure=insecure,
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
    from mdi.bench.verify import verify as compare
    from mdi.checkpoint.hub import locate
    from mdi.checkpoint.source import open_source

    source = open_source(locate(model, ckpt_folder=ckpt_folder, hf_token=hf_token))
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
def bench(
    model: Model,
    streams: Annotated[str, typer.Option(help="Streams at once, each alike.")] = "1,4,16",
    prompt_lengths: Annotated[str, typer.Option(help="Tokens of prompts, about; streams use the first.")] = "64,512",
    image_sizes: Annotated[str, typer.Option(help="Sides of square images, in pixels; '' for none.")] = "224,448",
    answer_tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 32,
    peer: Annotated[str | None, typer.Option(help="transformers: the same work there as well, and ratios.")] = None,
    out_folder: Annotated[
        Path | None, typer.Option("--out", help="Folder for bench.json, tokens.csv and plots.")
    ] = None,
    trace: Annotated[Path | None, typer.Option(help="File for a trace, for ui.perfetto.dev.")] = None,
    n_nodes: NNodes = 1,
    nodes_config: NodesJson = None,
    wait_s: WaitS = 600,
    certs: Certs = CERTS,
    insecure: Insecure = False,
    layers: Layers = None,
    dtype: Dtype = None,
    device: Device = None,
    ckpt_folder: CkptFolder = CHECKPOINTS,
    hf_token: HfToken = None,
) -> None:
    """Measure a model on these nodes: time to first token, between tokens, throughput, and where time and memory go."""
    from mdi.bench.run import room_for, run_bench, write_files
    from mdi.bench.scenario import sweep
    from mdi.bench.trace import write_trace
    from mdi.checkpoint.hub import locate
    from mdi.checkpoint.source import open_source

    if peer not in (None, "transformers"):
        raise ConfigError(f"--peer knows transformers, not {peer!r}")
    source = open_source(locate(model, ckpt_folder=ckpt_folder, hf_token=hf_token))
    sides = _parse_numbers(image_sizes, "--image-sizes") if image_sizes and source.model_config.vision else ()
    scenarios = sweep(
        _parse_numbers(streams, "--streams"),
        _parse_numbers(prompt_lengths, "--prompt-lengths"),
        sides,
        answer_tokens,
    )
    room = room_for(scenarios)
    engine = _engine(
        str(source.path),
        n_nodes=n_nodes,
        nodes_config=nodes_config,
        wait_s=wait_s,
        certs=certs,
        insecure=insecure,
        layers=_parse_layers(layers),
        dtype=dtype,
        device=device,
        sequence_length=room.sequence_length,
        max_sequences=room.max_sequences,
        max_pixels=room.max_pixels,
    )
    with engine, _runs_bar() as progress:
        task = progress.add_task("", total=None)
        done = run_bench(
            engine,
            source,
            scenarios,
            peer=peer is not None,
            progress=lambda what, n, total: progress.update(task, description=what, completed=n, total=total),
        )
    for table in done.tables():
        out.print(table)
    written = write_files(done, out_folder) if out_folder else []
    if trace:
        write_trace(trace, done.runs)
        written.append(trace)
    for path in written:
        out.print(f"wrote {path}", soft_wrap=True, highlight=False)


certs_app = typer.Typer(
    no_args_is_help=True,
    help="Certificates for encrypted links between nodes. Make all of them in one place, copy each node its own, "
    "and start every node with ENABLE_ENCRYPTION=1.",
)
app.add_typer(certs_app, name="certs")
CertsFolder = Annotated[Path, typer.Option(help="Folder with the authority, and with what it makes.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]


@certs_app.command("init")
def certs_init(
    folder: CertsFolder = CERTS,
    days: Annotated[int, typer.Option(help="How long it is valid.")] = 3650,
    force: Force = False,
) -> None:
    """Make an authority: its key makes certificates good, and stays here."""
    from mdi.rpc.authority import create_authority

    create_authority(folder, days=days, force=force)
    out.print(
        f"made {folder}/ca.pem and {folder}/ca.key. Keep ca.key here, and secret: who has it can join.\n"
        f"Next, for every node and the starter: mdi certs node NAME",
        highlight=False,
        soft_wrap=True,
    )


@certs_app.command("node")
def certs_node(
    name: Annotated[str, typer.Argument(help="starter, secondary0, secondary1, ..., finisher, spare0, ...")],
    addr: Annotated[
        list[str] | None, typer.Option(help="A host name or IP address of the node, to note in it.")
    ] = None,
    folder: CertsFolder = CERTS,
    days: Annotated[int, typer.Option(help="How long it is valid.")] = 90,
    force: Force = False,
) -> None:
    """Make a node's certificate. Peers check the node's name in it, so it may move to another address."""
    from mdi.rpc.authority import create_node, expiry

    identity = create_node(folder, name, addr or [], days=days, force=force)
    out.print(
        f"made {folder}/{name}.pem and {folder}/{name}.key, valid until {expiry(identity):%Y-%m-%d}.\n"
        f"Copy them, and {folder}/ca.pem, into the folder certs where {name} runs.",
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def demo(
    out_folder: Annotated[Path, typer.Option("--out", help="Folder for the pictures with their answers.")] = Path(
        "demo-output"
    ),
) -> None:
    """Three local nodes and the bundled model answer questions about sample images; no network needed."""
    from mdi.cli.demo import run

    run(out, out_folder)


def _engine(
    model: str,
    *,
    nodes_config: Path | None,
    wait_s: float,
    certs: Path,
    insecure: bool,
    dtype: str | None,
    device: str | None,
    spare_after: float = 5,
    **options: Any,
) -> Engine:
    """Loads a model, showing who is there and how far each node has loaded."""
    from mdi.cluster.launchers.manual import ManualNodes
    from mdi.cluster.nodes_config import NodesConfig
    from mdi.engine import Engine
    from mdi.rpc.tls import encryption_enabled

    manual_nodes, encryption, startup = None, encryption_enabled(), _Startup()
    if nodes_config:
        config = NodesConfig.read(nodes_config)
        manual_nodes = ManualNodes(config, wait_s, certs, insecure, startup.waiting, spare_after)
        dtype, device = dtype or config.starter.dtype, device or config.starter.device
    with startup.shown():
        return Engine(
            model,
            manual_nodes=manual_nodes,
            encryption=encryption,
            dtype=dtype,
            device=device or "cpu",
            progress=startup.loading,
            **options,
        )


class _Startup:
    """What is on the screen while an engine starts: who is awaited, and how far each node has loaded.

    Where there is no terminal, and later on, a line for each node whenever something about it changed.
    """

    def __init__(self) -> None:
        self._live = False
        self._present: Sequence[Presence] = ()
        self._progress = Progress(*BYTES_COLUMNS)
        self._tasks: dict[str, Any] = {}

    @contextmanager
    def shown(self) -> Iterator[None]:
        if err.is_terminal:
            self._live = True
            with Live(get_renderable=self._render, console=err, transient=True):
                yield
            self._live = False
        else:
            yield

    def waiting(self, present: Sequence[Presence]) -> None:
        if not self._live:
            for presence in present:
                if presence.note and presence not in self._present:
                    state = "is there" if presence.there else "is awaited"
                    err.print(
                        f"node {presence.node.name} {state}: {presence.note}",
                        markup=False,
                        highlight=False,
                        soft_wrap=True,
                    )
        self._present = present

    def loading(self, node: str, done: int, total: int) -> None:
        if node not in self._tasks:
            self._tasks[node] = self._progress.add_task(node, total=total)
        self._progress.update(self._tasks[node], completed=done, total=total)

    def _render(self) -> RenderableType:
        if not any(presence.missing for presence in self._present):
            return self._progress
        table = Table("node", "address", "", "", title="waiting for nodes", title_justify="left")
        for presence in self._present:
            state = "[green]there[/]" if presence.there else "[yellow]missing[/]"
            table.add_row(presence.node.name, presence.node.address, state, presence.note)
        return Group(table, self._progress)


class _NodeProgress:
    """What a node shows while it receives its weights and loads: a bar, or two lines where there is no terminal."""

    def __init__(self) -> None:
        self._doing = ""
        self._bar = Progress(*BYTES_COLUMNS, console=err, transient=True, disable=not err.is_terminal)

    def __call__(self, what: str, done: int, total: int) -> None:
        if what != self._doing:
            self._doing = what
            self._bar.start()
            self._task = self._bar.add_task(what, total=total)
            if not err.is_terminal:
                err.print(f"{what}: {(total - done) / 1e6:,.1f} of {total / 1e6:,.1f} MB to go", highlight=False)
        self._bar.update(self._task, completed=done, total=total)
        if done >= total:
            self._bar.stop()
            self._bar.remove_task(self._task)
            self._doing = ""
            err.print(f"{what}: done", highlight=False)


BYTES_COLUMNS = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())


@contextmanager
def _bytes_bar() -> Iterator[Progress]:
    with Progress(*BYTES_COLUMNS, console=err, transient=True, disable=not err.is_terminal) as progress:
        yield progress


def _runs_bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=err, transient=True, disable=not err.is_terminal)


def _print_nodes(engine: Engine) -> None:
    table = Table("node", "layers", "dtype", "device", "memory", title=engine.model_name)
    for node in engine.nodes():
        table.add_row(
            node.name,
            f"{node.first_layer}-{node.last_layer - 1}" if node.last_layer else "images" if node.dtype else "spare",
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
    return None if text is None else _parse_numbers(text, "--layers")


def _parse_numbers(text: str, option: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(
            f"{option} takes whole numbers with commas between them, like 10,10,8; got {text!r}"
        ) from None
