"""Options that more than one command takes, each declared once.

Options for settings of the engine have their names, meanings and defaults from `core/config.py`. A command
with a parameter of one of these dataclasses takes every field of it as an option: see `grouped`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mdi.cli import values
from mdi.cli.completion import checkpoints, words
from mdi.core.config import EngineConfig, ModelSettings, choices, meaning
from mdi.core.errors import ConfigError
from mdi.core.quantization import ModelQuantization

if TYPE_CHECKING:  # torch takes seconds to import: commands import what they need when they run
    from mdi.checkpoint.source import Source
    from mdi.engine import Engine

DEFAULTS = EngineConfig.of("")
CERTS = DEFAULTS.cluster.manual.certs


def setting(name: str, *flags: str, example: str = "", **settings: Any) -> Any:
    """An option for a setting of the engine, which has its meaning, and whose choices the shell completes."""
    if known := choices(name):
        settings["autocompletion"] = words(known)
    return typer.Option(*flags, help=meaning(name) + example, **settings)


Model = Annotated[str, typer.Argument(help=meaning("checkpoint"), autocompletion=checkpoints)]
N_NODES = setting("n_nodes", "--n-nodes", min=1)
NNodes = Annotated[int, N_NODES]
PipelineParallelSize = Annotated[
    int | None, setting("pipeline_parallel_size", "--pipeline-parallel-size", "-pp", min=1)
]
TensorParallelSize = Annotated[int, setting("tensor_parallel_size", "--tensor-parallel-size", "-tp", min=1)]
Groups = Annotated[str | None, setting("groups", example=" Example: 2,1,3.")]
Layers = Annotated[str | None, setting("layers", example=" Example: 10,10,8.")]
Dtype = Annotated[str | None, setting("dtype", parser=values.dtype, metavar="TEXT")]
Device = Annotated[str | None, setting("device")]
SequenceLength = Annotated[
    int | None,
    setting("sequence_length", "--sequence-length", "--max-model-len", parser=values.tokens, metavar="INTEGER"),
]
MaxSequences = Annotated[int, setting("max_sequences", "--max-sequences", "--max-num-seqs", min=1)]
KvCacheGb = Annotated[float | None, setting("kv_cache_gb", "--kv-cache-gb")]
KvCacheDtype = Annotated[
    str | None, setting("kv_cache_dtype", "--kv-cache-dtype", parser=values.unless_auto, metavar="TEXT")
]
Shards = Annotated[int, setting("shards", min=1)]
MaxPixels = Annotated[int | None, setting("max_pixels")]
MinPixels = Annotated[int | None, setting("min_pixels")]
NodesJson = Annotated[Path | None, setting("nodes_config", "--nodes-config")]
Certs = Annotated[Path, setting("certs")]
Insecure = Annotated[bool, setting("insecure", "--insecure")]
Images = Annotated[list[str] | None, typer.Option("--image", help="Path, URL or data: URL; may be repeated.")]
Videos = Annotated[list[str] | None, typer.Option("--video", help="Path, URL or data: URL; may be repeated.")]


@dataclass(frozen=True)
class CheckpointOptions:
    """Where a checkpoint comes from."""

    ckpt_folder: Annotated[Path, setting("ckpt_folder", "--ckpt-folder", "--download-dir")] = DEFAULTS.model.ckpt_folder
    hf_token: Annotated[str | None, setting("hf_token", envvar="HF_TOKEN")] = None
    adapter: Annotated[Path | None, setting("adapter")] = None
    mmproj: Annotated[Path | None, setting("mmproj")] = None

    def open(self, model: str, *, download: bool = True) -> Source:
        """The checkpoint, downloaded first where that is needed and allowed."""
        from mdi.checkpoint.hub import locate
        from mdi.checkpoint.source import open_source
        from mdi.cli.screen import BytesProgress

        path = locate(
            model,
            ckpt_folder=self.ckpt_folder,
            hf_token=self.hf_token,
            mmproj=self.mmproj,
            download=download,
            progress=BytesProgress(),
        )
        return open_source(path, self.adapter)


@dataclass(frozen=True)
class QuantizationOptions:
    """In which formats the weights are."""

    quantization: Annotated[str | None, setting("quantization", "--quantization", "-q")] = None
    head_quantization: Annotated[str | None, setting("head_quantization")] = None
    vision_quantization: Annotated[str | None, setting("vision_quantization")] = None

    def of(self, source: Source) -> ModelQuantization:
        """Those of a checkpoint's parts: what is asked for, or what it has. Raises ConfigError for an unknown one."""
        given = {item.name: getattr(self, item.name) for item in fields(QuantizationOptions)}
        return ModelSettings(**given).formats(source.quantization) or source.quantization


@dataclass(frozen=True)
class NodesOptions:
    """Which nodes there are, and what each gets."""

    n_nodes: Annotated[int | None, N_NODES] = None
    nodes_config: NodesJson = None
    certs: Certs = CERTS
    insecure: Insecure = False
    layers: Layers = None
    pipeline_parallel_size: PipelineParallelSize = None
    tensor_parallel_size: TensorParallelSize = DEFAULTS.cluster.tensor_parallel_size
    groups: Groups = None
    shards: Shards = DEFAULTS.cluster.shards
    optimize: Annotated[str, setting("optimize")] = DEFAULTS.cluster.optimize
    dtype: Dtype = None


@dataclass(frozen=True)
class EngineOptions(CheckpointOptions, QuantizationOptions, NodesOptions):
    """What every command that loads a model takes."""

    wait_s: Annotated[float, setting("wait_s")] = DEFAULTS.cluster.manual.wait_s
    device: Device = None
    ray: Annotated[str | None, setting("ray")] = None
    ray_resources: Annotated[str | None, setting("ray_resources")] = None
    ray_labels: Annotated[str | None, setting("ray_labels")] = None
    ray_strategy: Annotated[str, setting("ray_strategy")] = DEFAULTS.cluster.on_ray.ray_strategy

    def start(self, model: str, **settings: Any) -> Engine:
        """Loads a model, showing which nodes are present and how far each has loaded."""
        from mdi.cli.screen import Startup
        from mdi.engine import Engine

        startup = Startup()
        with startup.shown():
            return Engine(self.config(model, **settings), progress=startup.loading, waiting=startup.waiting)

    def config(self, model: str, **settings: Any) -> EngineConfig:
        """All settings of the engine. Raises ConfigError for those out of range or against each other."""
        from mdi.rpc.tls import encryption_enabled

        options = {field.name: getattr(self, field.name) for field in fields(self)}
        return EngineConfig.of(model, encryption=encryption_enabled(), **options | self._parsed | settings)

    @property
    def _parsed(self) -> dict[str, Any]:
        """Settings that are more than a word on the command line."""
        return {
            "layers": parse_layers(self.layers),
            "groups": parse_groups(self.groups),
            "ray_resources": values.amounts(self.ray_resources, "--ray-resources"),
            "ray_labels": values.pairs(self.ray_labels, "--ray-labels"),
        }


@dataclass(frozen=True)
class LimitOptions:
    """How long and how large the requests of one caller may be."""

    sequence_length: SequenceLength = None
    kv_cache_gb: KvCacheGb = None
    kv_cache_dtype: KvCacheDtype = None
    min_pixels: MinPixels = None
    max_pixels: MaxPixels = None


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Decorator of a command: the fields of its dataclass parameters become options in their place."""
    parameters = inspect.signature(command, eval_str=True).parameters.values()
    groups: dict[str, Any] = {item.name: item.annotation for item in parameters if is_dataclass(item.annotation)}

    @wraps(command)
    def run(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        command(**given)

    options = list[inspect.Parameter]()
    for item in parameters:
        group = groups.get(item.name)
        options += inspect.signature(group, eval_str=True).parameters.values() if group else [item]
    keywords = [option.replace(kind=inspect.Parameter.KEYWORD_ONLY) for option in options]
    run.__signature__ = inspect.Signature(keywords)  # type: ignore[attr-defined]
    return run


def parse_layers(text: str | None) -> tuple[int, ...] | None:
    return None if text is None else parse_numbers(text, "--layers")


def parse_groups(text: str | None) -> tuple[int, ...] | None:
    return None if text is None else parse_numbers(text, "--groups")


def parse_numbers(text: str, option: str) -> tuple[int, ...]:
    """Whole numbers with commas between them. Raises ConfigError, naming the option, for anything else."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(
            f"{option} takes whole numbers with commas between them, like 10,10,8; got {text!r}"
        ) from None
