"""The settings of an engine and of its HTTP server: frozen sections. Each setting, its default and its meaning stand
here only."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Self, TypeVar, cast

from mdi.core.dtypes import DTYPE_NAMES
from mdi.core.errors import ConfigError
from mdi.core.quantization import NONE, QUANTIZATIONS, ModelQuantization

T = TypeVar("T")

FORMATS = (*QUANTIZATIONS, NONE)
MEBIBYTE = 2**20
DEFAULT_SEQUENCE_LENGTH = 32_768
LOG_LEVELS = ("critical", "error", "warning", "info", "debug", "trace")
ROOT_PATH = re.compile(r"(/[^/\s?#]+)+")
ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^/\s]+")


def setting(
    default: T,
    meaning: str,
    *,
    low: float | None = None,
    above: float | None = None,
    choices: tuple[str, ...] = (),
) -> T:
    """A field of a section. low, above: the least value, and the bound below all values. choices: the only values."""
    metadata = {"meaning": meaning, "low": low, "above": above, "choices": choices}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Section:
    """A dataclass whose fields are settings or sections. Raises ConfigError for a wrong type or range."""

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if _kind(item) == "Path" and isinstance(value, str):
                object.__setattr__(self, item.name, Path(value))
            elif value is not None and not isinstance(value, Section):
                _check_type(item, value)
                _check_range(item, value)

    def with_settings(self, **settings: Any) -> Self:
        """This section with other values; names are those of fields at any depth. Raises ConfigError for others."""
        known = [item.name for item in _all_fields(self)]
        for name in settings:
            if name not in known:
                near = get_close_matches(name, known, 1)
                raise ConfigError(
                    f"unknown setting {name}: " + (f"did you mean {near[0]}?" if near else "see EngineConfig")
                )
        return cast(Self, _replaced(self, settings))


@dataclass(frozen=True)
class ModelSettings(Section):
    """Which model, and what it is computed in."""

    checkpoint: str = setting(
        "", "A checkpoint's folder, its name on the Hugging Face hub, a GGUF file, bundled, or random:qwen2-vl-2b."
    )
    adapter: Path | None = setting(None, "Folder of a LoRA adapter, as PEFT saves it, that is merged into the weights.")
    dtype: str | None = setting(
        None, "float32, bfloat16 or float16; the checkpoint's own if not given.", choices=DTYPE_NAMES
    )
    quantization: str | None = setting(
        None,
        "Weights of decoder layers and LM head as int8, int8-32 (a scale for each 32 inputs) or int4; none: not "
        "quantised. Not given: as prepared chunks are, or near to how the checkpoint is stored.",
        choices=FORMATS,
    )
    head_quantization: str | None = setting(
        None, "Weights of the LM head as int8, int8-32, int4 or none; as the layers' if not given.", choices=FORMATS
    )
    vision_quantization: str | None = setting(
        None, "Weights of the vision tower as int8, int8-32, int4 or none; as they are if not given.", choices=FORMATS
    )
    device: str | None = setting(None, "Where this node computes: cpu (the default), cuda, cuda:1, mps.")
    ckpt_folder: Path = setting(Path("checkpoints"), "Where checkpoints from the hub are kept.")
    hf_token: str | None = setting(None, "Access token for gated checkpoints.")
    mmproj: Path | None = setting(None, "GGUF file with the vision tower (mmproj) of a model that is a GGUF file.")
    chat_template: str | None = setting(
        None, "File with a chat template in Jinja, or its text, in place of the checkpoint's."
    )
    generation_config: str = setting(
        "auto",
        "Where the defaults of sampling are: auto, the checkpoint's generation_config.json; vllm, nowhere; or a folder "
        "with such a file.",
    )
    tool_call_parser: str = setting(
        "auto",
        "How the model writes calls of tools: hermes, llama3_json, mistral, generic; auto: as its template does.",
    )
    reasoning_parser: str = setting(
        "auto", "How the model marks its thoughts: deepseek_r1, qwen3, mistral or none; auto: as its template does."
    )

    def formats(self, stored: ModelQuantization) -> ModelQuantization | None:
        """The quantisation that is asked for; None takes that of chunks where there are some.

        stored: that of the checkpoint.
        """
        return ModelQuantization.asked(self.quantization, self.head_quantization, self.vision_quantization, stored)


@dataclass(frozen=True)
class CacheSettings(Section):
    """How much the KV cache and the cache of encoded media hold, and how much is computed at once."""

    sequence_length: int | None = setting(
        None,
        "Most tokens of prompt and answer together. If not given: the model's most, up to "
        f"{DEFAULT_SEQUENCE_LENGTH}, where memory permits.",
    )
    max_sequences: int = setting(16, "Samples that run at once; more wait.", low=1)
    batch_tokens: int = setting(  # from here on more rows make no product faster
        512, "Most tokens that are computed in one step: one of each running sample, the rest of prompts.", low=1
    )
    kv_cache_gb: float | None = setting(
        None,
        "Most gigabytes of keys and values that each node keeps for its layers. If not given: half of what is free "
        "beside the weights, or what all samples of full length take, if less.",
        above=0,
    )
    kv_cache_dtype: str | None = setting(
        None,
        "int8: keys and values take half of the memory, and are rounded to 8 bits. If not given: the model's dtype.",
        choices=("int8",),
    )
    vision_cache_bytes: int = setting(  # 65 images of 1,280 tokens of the 2B model
        256 * MEBIBYTE,
        "Memory for encoded images and videos, for later requests that show the same; 0 keeps none.",
        low=0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_tokens < self.max_sequences:
            raise ConfigError(
                f"a step of {self.batch_tokens} tokens has none for each of {self.max_sequences} samples: raise "
                "batch_tokens (--max-num-batched-tokens), or lower max_sequences (--max-num-seqs)"
            )

    def sequence_length_for(self, max_positions: int) -> int:
        """The longest sequence, for a model of so many positions. Raises ConfigError beyond them."""
        if self.sequence_length is None:
            return min(DEFAULT_SEQUENCE_LENGTH, max_positions)
        if not 2 <= self.sequence_length <= max_positions:
            raise ConfigError(
                f"the sequence length must be between 2 and the model's {max_positions}, got {self.sequence_length}"
            )
        return self.sequence_length


@dataclass(frozen=True)
class RequestLimits(Section):
    """What is accepted of requests."""

    max_queue: int = setting(256, "Requests that run or wait at once; more are refused.", low=0)
    min_pixels: int | None = setting(None, "Smallest area an image is given, in pixels.", low=1)
    max_pixels: int | None = setting(
        None, "Largest area an image or a video's frame is given, in pixels (784 make a token).", low=1
    )


@dataclass(frozen=True)
class MediaPolicy(Section):
    """What media may be loaded from where, and how much of it. The defaults suit a server on the public internet."""

    media_dir: Path | None = setting(
        None, "Requests may name files in this folder, symlinks resolved; without one, no files."
    )
    any_file: bool = setting(False, "Any file this process can read; for Python and the command line.")
    remote: bool = setting(True, "Whether http and https URLs are fetched at all.")
    private_hosts: bool = setting(False, "Fetch from loopback, private and other non-public addresses, too.")
    media_domains: tuple[str, ...] = setting(
        (), "A host that images and videos are fetched from; may be repeated. If none is given: any public one."
    )
    max_media: int = setting(256, "Most images and videos of one request.", low=0)
    max_images: int | None = setting(None, "Most images of one request.", low=0)
    max_videos: int | None = setting(None, "Most videos of one request.", low=0)
    max_bytes: int = setting(32 * MEBIBYTE, "Longest image file, in bytes as sent.", low=0)
    max_video_bytes: int = setting(256 * MEBIBYTE, "Longest video file, in bytes as sent.", low=0)
    max_image_pixels: int = setting(  # lets the 108-megapixel pictures of phones through
        120_000_000, "Largest image (width times height) that is decoded; checked in the header.", low=0
    )
    max_video_pixels: int = setting(8192 * 4320, "Largest frame of a video that is decoded; 8K passes.", low=0)
    max_video_frames: int = setting(  # half an hour at 30 a second
        54_000, "Longest video, in frames of the file, of which a few are sampled.", low=0
    )
    video_timeout_s: float = setting(
        120.0, "Seconds for counting and decoding one video, or for fetching all frames of one.", above=0
    )
    fetch_timeout_s: float = setting(20.0, "Seconds for one download, name lookup and redirects included.", above=0)


@dataclass(frozen=True)
class ManualNodes(Section):
    """Nodes that are started on their machines, not by this process."""

    nodes_config: Path | None = setting(None, "JSON file with all nodes, each started on its machine.")
    wait_s: float = setting(
        600.0, "Seconds to wait at the start for nodes of the nodes-config, or for room on the Ray cluster.", above=0
    )
    certs: Path = setting(Path("certs"), "Folder with this node's certificate, for encrypted links.")
    insecure: bool = setting(False, "Allow unencrypted links beyond this machine.")
    spare_after_s: float = setting(5.0, "Seconds for a lost node to come back before a spare takes its place.", low=0)


@dataclass(frozen=True)
class RayNodes(Section):
    """Nodes that Ray places on the machines of a cluster. Links are encrypted unless `insecure`."""

    ray: str | None = setting(
        None,
        "Ray cluster that places the nodes, one on each machine: auto, or host:port. Links are encrypted without "
        "further ado, unless --insecure.",
    )
    ray_resources: Mapping[str, float] | None = setting(
        None,
        "What each node reserves on its Ray machine, instead of the CPUs that are free and the memory of the plan: "
        "CPU=8,memory=16e9 (in bytes), GPU=1, or a resource of your own.",
    )
    ray_labels: Mapping[str, str] | None = setting(
        None, "Labels of the Ray machines that may get nodes: market-type=spot,zone=in(a,b)."
    )
    ray_strategy: str = setting(
        "STRICT_SPREAD",
        "How Ray spreads the nodes: STRICT_SPREAD, each on a machine of its own, none on the starter's; SPREAD and "
        "PACK where they can; STRICT_PACK on one machine.",
        choices=("STRICT_SPREAD", "SPREAD", "PACK", "STRICT_PACK"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, amount in (self.ray_resources or {}).items():
            if isinstance(amount, bool) or not isinstance(amount, int | float) or not 0 <= amount < math.inf:
                raise ConfigError(f"ray_resources: {name} must be a number of at least 0, got {amount!r}")
        if self.ray is None and (self.ray_resources or self.ray_labels):
            raise ConfigError("--ray-resources and --ray-labels are for nodes on a Ray cluster: name it with --ray")


@dataclass(frozen=True)
class RecoveryLimits(Section):
    """How long and how often lost nodes are brought back before requests fail."""

    recovery_timeout_s: float = setting(120.0, "Seconds that requests wait for lost nodes.", above=0)
    max_losses: int = setting(5, "Most losses of one node in a row, each within settled_s of running.", low=0)
    settled_s: float = setting(60.0, "Seconds of running after which losses before count no more.", low=0)


@dataclass(frozen=True)
class ClusterConfig(Section):
    """The nodes that the model is spread over. n_nodes: follows from groups, where they are given."""

    n_nodes: int | None = setting(
        None,
        "Nodes the model is split over; if not given, one, or as many as the groups have, and with --ray one on each "
        "machine.",
        low=1,
    )
    layers: tuple[int, ...] | None = setting(
        None, "Layers per node, or per stage where several nodes compute one, overriding the plan."
    )
    pipeline_parallel_size: int | None = setting(
        None, "Stages, one after the other: --n-nodes is so many times --tensor-parallel-size.", low=1
    )
    tensor_parallel_size: int = setting(
        1, "Nodes that compute each stage together, a group: all of them, or --n-nodes in groups of so many.", low=1
    )
    groups: tuple[int, ...] | None = setting(
        None, "Nodes of each stage, where stages have unequal numbers. The nodes of one compute each layer together."
    )
    shards: int = setting(
        1,
        "Parts in which the sums of every layer are taken, one after the other; with groups at least one for each node "
        "of a group, and as many as suit them if not given. A server with the same number gives the same text, bit for "
        "bit, however many nodes compute a stage.",
        low=1,
    )
    optimize: str = setting(
        "latency",
        "What a plan of measured machines makes fastest: latency, the answer of one stream; throughput, many streams.",
        choices=("latency", "throughput"),
    )
    encryption: bool = setting(False, "Links between nodes are encrypted (mutual TLS).")
    manual: ManualNodes = field(default_factory=ManualNodes)
    on_ray: RayNodes = field(default_factory=RayNodes)
    recovery: RecoveryLimits = field(default_factory=RecoveryLimits)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "layers", tuple(self.layers) if self.layers else None)
        object.__setattr__(self, "groups", tuple(self.groups) if self.groups else None)
        if self.pipeline_parallel_size:
            object.__setattr__(self, "n_nodes", self._count_nodes(self.pipeline_parallel_size))
        if self.manual.nodes_config and ((self.n_nodes or 1) != 1 or self.layers or self._grouped):
            raise ConfigError(
                "the nodes-config says how many nodes there are, and their layers and groups: leave these options out"
            )
        if self._grouped:
            self._check_groups()
            object.__setattr__(self, "n_nodes", sum(self.group_sizes or ()))
        if self.manual.nodes_config and self.on_ray.ray:
            raise ConfigError(
                "--ray and --nodes-config exclude each other: Ray places the nodes, or you start those of the file"
            )

    @property
    def group_sizes(self) -> tuple[int, ...] | None:
        """Nodes of each stage; None where each stage has one, or a plan may choose."""
        size = self.tensor_parallel_size
        return self.groups or ((size,) * ((self.n_nodes or size) // size) if size > 1 else None)

    @property
    def _grouped(self) -> bool:
        return self.groups is not None or self.tensor_parallel_size > 1

    def _count_nodes(self, n_stages: int) -> int:
        """The nodes of so many stages. Raises ConfigError where other settings contradict them."""
        if self.groups and len(self.groups) != n_stages:
            raise ConfigError(
                f"--groups names {len(self.groups)} stages, but --pipeline-parallel-size says {n_stages}: leave it out"
            )
        n_nodes = sum(self.groups or (n_stages * self.tensor_parallel_size,))
        if self.n_nodes not in (None, n_nodes):
            raise ConfigError(
                f"--pipeline-parallel-size {n_stages} makes {n_nodes} nodes, but --n-nodes says {self.n_nodes}: leave "
                "one of them out"
            )
        return n_nodes

    def _check_groups(self) -> None:
        """Raises ConfigError for groups that contradict other settings."""
        size, sizes = self.tensor_parallel_size, self.group_sizes or ()
        text, n_nodes = ",".join(map(str, sizes)), sum(sizes)
        if self.groups and size > 1:
            raise ConfigError("--groups and --tensor-parallel-size both say how many nodes a stage has: leave one out")
        if min(sizes, default=0) < 1 and self.groups:
            raise ConfigError(f"--groups {text}: every stage needs at least one node")
        if self.n_nodes in (None, n_nodes):
            return
        if self.groups:
            raise ConfigError(
                f"--groups {text} are {n_nodes} nodes in all, but --n-nodes says {self.n_nodes}: leave --n-nodes out"
            )
        raise ConfigError(
            f"--n-nodes {self.n_nodes} is no multiple of --tensor-parallel-size {size}: give a multiple, or the nodes "
            "of each stage with --groups"
        )


@dataclass(frozen=True)
class EngineConfig(Section):
    """All settings of an engine. By default any local file and any public URL may be shown."""

    model: ModelSettings
    cache: CacheSettings = field(default_factory=CacheSettings)
    limits: RequestLimits = field(default_factory=RequestLimits)
    media: MediaPolicy = field(default_factory=lambda: MediaPolicy(any_file=True))
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    @classmethod
    def of(cls, checkpoint: str | Path, **settings: Any) -> EngineConfig:
        """The settings of a checkpoint's engine, by the fields' own names: `of("bundled", n_nodes=3)`.

        A section's name takes a whole section. Raises ConfigError for an unknown name or a value out of range.
        """
        return cls(ModelSettings(str(checkpoint))).with_settings(**settings)


@dataclass(frozen=True)
class GatewayConfig(Section):
    """All settings of the HTTP server."""

    host: str = setting("127.0.0.1", "Address the HTTP server binds.")
    allow_hosts: tuple[str, ...] = setting(
        (), "A further name of this server, for servers without a key; may be repeated."
    )
    allow_origins: tuple[str, ...] = setting(
        (), "A site whose pages may use this server, like https://chat.example.com; * is all. May be repeated."
    )
    api_keys: tuple[str, ...] = setting((), "Key that requests must bring, one of several; may be repeated.")
    api_keys_file: Path | None = setting(
        None, "YAML file with API keys: names, limits and expiry. It is reread when it changes."
    )
    metrics_key: str | None = setting(None, "Key that opens GET /metrics and nothing else, for Prometheus.")
    otlp_traces_endpoint: str | None = setting(
        None,
        "Collector that gets OpenTelemetry traces, like http://127.0.0.1:4318: needs the extra tracing.",
    )
    served_model_name: tuple[str, ...] = setting(
        (), "A name of the model, in place of its own; may be repeated. The first one stands in answers."
    )
    strict_requests: bool = setting(False, "Refuse unknown fields in OpenAI requests instead of ignoring them.")
    max_body_bytes: int = setting(64 * MEBIBYTE, "Longest JSON body of a request.", low=0)
    max_upload_bytes: int = setting(320 * MEBIBYTE, "Longest form with files.", low=0)  # a video and some images
    request_timeout_s: float | None = setting(
        3600.0, "Seconds for an answer, including the time in the queue.", above=0
    )
    drain_timeout_s: float = setting(
        30.0, "Seconds that running requests have to end after SIGTERM; then they end with an error.", low=0
    )
    max_connections: int = setting(1024, "Open connections; half of the files that may be open, if less.", low=1)
    head_timeout_s: float = setting(20.0, "Seconds for the head of a request.", above=0)
    stall_timeout_s: float = setting(
        60.0, "Seconds in which no more of a request arrives, or no more of an answer is read.", above=0
    )
    root_path: str = setting("", "Path under which a proxy shows this server, like /mdi.")
    ssl_certfile: Path | None = setting(
        None, "Certificate of this server, and those that lead to its authority: HTTPS."
    )
    ssl_keyfile: Path | None = setting(None, "Key of the certificate, if it is not in the same file.")
    ssl_keyfile_password: str | None = setting(None, "Password of the key.")
    ssl_ca_certs: Path | None = setting(None, "Authorities of clients: each must then have a certificate of one.")
    uvicorn_log_level: str = setting("error", "How much the HTTP library logs.", choices=LOG_LEVELS)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_tls()
        if self.root_path and not ROOT_PATH.fullmatch(self.root_path):
            raise ConfigError(f"a root path begins with / and does not end with it, like /mdi; got {self.root_path!r}")
        if "" in self.served_model_name:
            raise ConfigError("a name of the model is empty: leave it out, or name it")
        if "" in self.api_keys:
            raise ConfigError("the API key is empty: give one, or none at all")
        if self.metrics_key is not None and (not self.metrics_key or not self.needs_key):
            raise ConfigError("--metrics-key needs a value, and --api-key or --api-keys: without these all is open")
        if self.otlp_traces_endpoint is not None and not self.otlp_traces_endpoint.startswith(("http://", "https://")):
            raise ConfigError(f"a collector is like http://127.0.0.1:4318; got {self.otlp_traces_endpoint!r}")
        for origin in self.allow_origins:
            if not ORIGIN.fullmatch(origin):
                raise ConfigError(f"an origin is like https://chat.example.com:8080, without a path; got {origin!r}")

    @property
    def needs_key(self) -> bool:
        """Whether requests must bring an API key."""
        return bool(self.api_keys) or self.api_keys_file is not None

    def _check_tls(self) -> None:
        """Raises ConfigError for what says how to do HTTPS without a certificate to do it with."""
        needing = ("ssl_keyfile", "ssl_keyfile_password", "ssl_ca_certs")
        if self.ssl_certfile is None and (given := [name for name in needing if getattr(self, name) is not None]):
            raise ConfigError(f"--{given[0].replace('_', '-')} needs a certificate: give it with --ssl-certfile")


def meaning(name: str) -> str:
    """What a setting means, in a sentence."""
    return str(_field(name).metadata["meaning"])


def choices(name: str) -> tuple[str, ...]:
    """The only values of a setting; none where it has others."""
    return tuple(_field(name).metadata["choices"])


def _field(name: str) -> Field[Any]:
    known = (*_all_fields(EngineConfig.of("")), *_all_fields(GatewayConfig()))
    return next(item for item in known if item.name == name)


def _all_fields(section: Section) -> Iterator[Field[Any]]:
    for item in fields(section):
        yield item
        value = getattr(section, item.name)
        if isinstance(value, Section):
            yield from _all_fields(value)


def _replaced(section: Any, settings: dict[str, Any]) -> Any:
    changes = {}
    for item in fields(section):
        before = getattr(section, item.name)
        value = settings.get(item.name, before)
        if isinstance(before, Section):
            if type(value) is not type(before):
                kind, given = type(before).__name__, type(value).__name__
                raise ConfigError(f"{item.name} must be of {kind}, got {given}")
            value = _replaced(value, settings)
        if value is not before:
            changes[item.name] = value
    return replace(section, **changes) if changes else section


def _kind(item: Field[Any]) -> str:
    """The name of a field's type, without None."""
    return str(item.type).removesuffix(" | None")


def _check_type(item: Field[Any], value: Any) -> None:
    match _kind(item):
        case "int" if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"{item.name} must be a whole number, got {value!r}")
        case "float" if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{item.name} must be a number, got {value!r}")
        case "bool" if not isinstance(value, bool):
            raise ConfigError(f"{item.name} must be true or false, got {value!r}")


def _check_range(item: Field[Any], value: Any) -> None:
    low, above, choices = (item.metadata.get(name) for name in ("low", "above", "choices"))
    if choices and value not in choices:
        raise ConfigError(f"{item.name} must be one of {', '.join(choices)}, got {value!r}")
    if low is not None and not value >= low:
        raise ConfigError(f"{item.name} must be at least {low:g}, got {value:g}")
    if above is not None and not value > above:
        raise ConfigError(f"{item.name} must be above {above:g}, got {value:g}")
