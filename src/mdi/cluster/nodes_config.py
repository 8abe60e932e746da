"""The nodes-config: which node is on which machine. One JSON file, checked key by key. No sockets, no weights.

    {"nodes": {"starter":   {"addr": "10.0.0.1", "communication": {"port": 5000}},
               "secondary": [{"addr": "10.0.0.2", "communication": {"port": 5000}, "device": "cuda"}, ...],
               "finisher":  {...}, "vision": {...}, "spare": [{...}, ...]}}

Without a finisher, the last secondary is it, and its certificate and its chunk may have either name. These keys of
upstream's files are accepted and ignored: `inference`, `starter_server`, and `starter_addr` in `communication`.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from ipaddress import ip_address
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from mdi.core.dtypes import DTYPE_NAMES
from mdi.core.errors import ConfigError
from mdi.rpc.authority import HOST_NAME

MAX_FILE_BYTES = 2**20
MAX_NODES = 1024


@dataclass(frozen=True)
class NodeConfig:
    """One node. name: its role, as its chunk has it (starter, secondary0, finisher). key: where the file names it.

    other_name: of the last secondary where there is no finisher: it is `finisher`, and may be called by its place, too.
    device, dtype, threads: as `mdi secondary` takes them; None leaves the choice to it. memory_gb: most it may use, in
    1e9 bytes. layers: how many decoder layers it gets; group: the number of its stage, which neighbours with the same
    number compute together. All nodes have that, or none.
    """

    name: str
    key: str
    addr: str
    port: int
    device: str | None = None
    dtype: str | None = None
    threads: int | None = None
    memory_gb: float | None = None
    layers: int | None = None
    group: int | None = None
    other_name: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """What its certificate and its chunk may call it, its role first."""
        return (self.name, self.other_name) if self.other_name else (self.name,)

    @property
    def address(self) -> str:
        """Where it listens, host:port."""
        return f"[{self.addr}]:{self.port}" if ":" in self.addr else f"{self.addr}:{self.port}"


@dataclass(frozen=True)
class NodesConfig:
    """All nodes. pipeline: those after the starter, in order. spares: take the place of one that died."""

    starter: NodeConfig
    pipeline: tuple[NodeConfig, ...]
    vision: NodeConfig | None = None
    spares: tuple[NodeConfig, ...] = ()

    @classmethod
    def read(cls, path: Path) -> NodesConfig:
        """Raises ConfigError, naming the file and the key, for a file that cannot be used."""
        try:
            with path.open("rb") as file:
                data = file.read(MAX_FILE_BYTES + 1)
        except OSError as error:
            raise ConfigError(f"the nodes-config {str(path)!r} cannot be read ({error.strerror})") from None
        try:
            return cls.parse(data)
        except ConfigError as error:
            raise ConfigError(f"{path.name}: {error}") from None

    @classmethod
    def parse(cls, data: bytes) -> NodesConfig:
        """From the file's bytes. Raises ConfigError, naming the key."""
        if len(data) > MAX_FILE_BYTES:
            raise ConfigError(f"is larger than {MAX_FILE_BYTES} bytes")
        try:
            document = json.loads(data, object_pairs_hook=_without_repeats)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"is not JSON ({error})") from None
        try:
            config = _File.model_validate(document).config()
        except ValidationError as error:
            raise ConfigError(_explained(error)) from None
        _check_addresses(config.all)
        _check_agreement(config)
        return config

    @property
    def all(self) -> tuple[NodeConfig, ...]:
        """Every node the file names."""
        return (self.starter, *self.pipeline, *((self.vision,) if self.vision else ()), *self.spares)

    @property
    def n_nodes(self) -> int:
        """Nodes that hold layers, the starter among them."""
        return 1 + len(self.pipeline)

    @property
    def stages(self) -> tuple[tuple[NodeConfig, ...], ...]:
        """The nodes of each stage, in pipeline order: one, or those of a group."""
        nodes = (self.starter, *self.pipeline)
        by_group = groupby(enumerate(nodes), key=lambda item: item[0] if item[1].group is None else (item[1].group,))
        return tuple(tuple(node for _, node in stage) for _, stage in by_group)

    @property
    def groups(self) -> tuple[int, ...] | None:
        """Nodes of each stage; None when that is left to the plan."""
        return tuple(map(len, self.stages)) if self.starter.group is not None else None

    @property
    def layers(self) -> tuple[int, ...] | None:
        """Layers of each stage, the starter's first; None when they are left to the plan."""
        counts = tuple(stage[0].layers for stage in self.stages if stage[0].layers is not None)
        return counts or None

    def without(self, places: Collection[int]) -> NodesConfig:
        """The same where these nodes, by their places in the pipeline, are spares; the starter is 0, and stays."""
        kept = tuple(node for place, node in enumerate(self.pipeline, start=1) if place not in places)
        left_out = tuple(node for place, node in enumerate(self.pipeline, start=1) if place in places)
        return replace(self, pipeline=kept, spares=(*self.spares, *left_out))

    def check_layers(self, n_layers: int) -> None:
        """Raises ConfigError unless the layers, where given, are those of a model of `n_layers`."""
        if self.layers and sum(self.layers) != n_layers:
            text = " + ".join(map(str, self.layers))
            raise ConfigError(
                f"nodes.*.layers add up to {text} = {sum(self.layers)}, but the model has {n_layers} layers"
            )
        if len(self.stages) > n_layers:
            what = f"{len(self.stages)} stages" if self.groups else f"{self.n_nodes} nodes"
            raise ConfigError(f"nodes names {what}, more than the model's {n_layers} layers")

    @property
    def vision_node(self) -> NodeConfig:
        """Raises ConfigError when there is none."""
        if self.vision is None:
            raise ConfigError("the nodes-config has no node nodes.vision")
        return self.vision

    def spare(self, index: int) -> NodeConfig:
        """A spare by its place among them. Raises ConfigError when there is none."""
        if 0 <= index < len(self.spares):
            return self.spares[index]
        known = ", ".join(spare.name for spare in self.spares)
        raise ConfigError(f"the nodes-config has no spare {index} in nodes.spare: it has {known or 'none'}")

    def node(self, index: int) -> NodeConfig:
        """A node after the starter, by its place in the pipeline. Raises ConfigError when there is none."""
        if 0 <= index < len(self.pipeline):
            return self.pipeline[index]
        known = ", ".join(f"{place} ({node.name})" for place, node in enumerate(self.pipeline))
        raise ConfigError(f"the nodes-config has no node {index} after the starter: it has {known or 'none'}")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {_shown(key)} appears twice in one object")
    for key in value:
        if not key.isascii() and key.encode(errors="replace").decode() != key:
            raise ValueError(f"the key {_shown(key)} is no text")
    return value


def _at_most_max_nodes(value: Any) -> Any:
    if isinstance(value, list) and len(value) > MAX_NODES:
        raise ValueError(f"must have at most {MAX_NODES} nodes, got {len(value)}")
    return value


def _address(value: Any) -> Any:
    """A host's name or IP address, as others reach it."""
    found = _ip(value) if isinstance(value, str) else None
    if not isinstance(value, str) or not value.isascii() or not (found or HOST_NAME.fullmatch(value)):
        raise ValueError(f"must be a host's name or IP address, without port, got {_shown(value)}")
    if found and (found.is_unspecified or found.is_multicast):
        raise ValueError(f"must be an address that the other nodes can reach, not {value}")
    return value


def _word(value: Any) -> Any:
    if not isinstance(value, str) or not value.isascii() or not value.isprintable() or not value.strip():
        raise ValueError(f"must be a word, got {_shown(value)}")
    return value


def _whole(low: int, high: int, default: Any = None) -> Any:
    """A field for a whole number. The description says what a value must be, here and below."""
    description = f"a whole number from {low} to {high}"
    return Field(default, strict=True, ge=low, le=high, description=description)


def _optional(**constraints: Any) -> Any:
    """A field that may be left out, but must not be null."""
    return Field(None, **constraints)


class _Object(BaseModel):
    """A JSON object of the file: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class _Communication(_Object):
    port: int = _whole(1, 65535, default=...)
    starter_addr: Any = None


class _Node(_Object):
    addr: Annotated[str, BeforeValidator(_address)]
    communication: _Communication
    device: Annotated[str, BeforeValidator(_word)] = _optional()
    dtype: Literal["float32", "bfloat16", "float16"] = _optional(description=f"one of {', '.join(DTYPE_NAMES)}")
    threads: int = _whole(1, 4096)
    memory_gb: float = _optional(strict=True, gt=0, lt=1e9, allow_inf_nan=False, description="a number above 0")
    inference: Any = None
    starter_server: Any = None


class _StageNode(_Node):
    layers: int = _whole(1, 100_000)
    group: int = _whole(0, MAX_NODES)


class _Nodes(_Object):
    starter: _StageNode
    secondary: Annotated[list[_StageNode], BeforeValidator(_at_most_max_nodes)] = Field(
        [], description="a list of nodes"
    )
    finisher: _StageNode = _optional()
    vision: _Node = _optional()
    spare: Annotated[list[_Node], BeforeValidator(_at_most_max_nodes)] = Field([], description="a list of nodes")


class _File(_Object):
    nodes: _Nodes

    def config(self) -> NodesConfig:
        nodes = self.nodes
        after = [(f"nodes.secondary[{index}]", node) for index, node in enumerate(nodes.secondary)]
        if nodes.finisher:
            after.append(("nodes.finisher", nodes.finisher))
        places = [f"secondary{index}" for index in range(len(after))]
        stages = [_node_config(name, key, node) for name, (key, node) in zip(places, after, strict=True)]
        if stages:
            other_name = "" if nodes.finisher else stages[-1].name
            stages[-1] = replace(stages[-1], name="finisher", other_name=other_name)
        return NodesConfig(
            starter=_node_config("starter", "nodes.starter", nodes.starter),
            pipeline=tuple(stages),
            vision=_node_config("vision", "nodes.vision", nodes.vision) if nodes.vision else None,
            spares=tuple(
                _node_config(f"spare{index}", f"nodes.spare[{index}]", node) for index, node in enumerate(nodes.spare)
            ),
        )


def _node_config(name: str, key: str, node: _Node) -> NodeConfig:
    return NodeConfig(
        name=name,
        key=key,
        addr=node.addr,
        port=node.communication.port,
        device=node.device,
        dtype=node.dtype,
        threads=node.threads,
        memory_gb=node.memory_gb,
        layers=node.layers if isinstance(node, _StageNode) else None,
        group=node.group if isinstance(node, _StageNode) else None,
    )


def _explained(error: ValidationError) -> str:
    """What is wrong first, with the key and the remedy."""
    first = error.errors(include_url=False)[0]
    *parents, last = first["loc"] or ("",)
    key, got = _key(first["loc"]), _shown(first["input"])
    match first["type"]:
        case "missing":
            return f"{key} is missing"
        case "extra_forbidden" | "invalid_key":
            known = list(_model_at(parents).model_fields)
            near = get_close_matches(str(last), known, 1)
            return f"{key} is unknown: " + (f"did you mean {near[0]}?" if near else f"it has {', '.join(known)}")
        case "value_error":
            return f"{key} {first['ctx']['error']}"
        case "model_type":
            return f"{key or 'the file'} must be an object, got {got}"
        case _:
            return f"{key} must be {_model_at(parents).model_fields[str(last)].description}, got {got}"


def _model_at(steps: Sequence[int | str]) -> type[_Object]:
    """The model of the object at a place in the file."""
    model: type[_Object] = _File
    for step in steps:
        if isinstance(step, str):
            annotation: Any = model.model_fields[step].annotation
            model = get_args(annotation)[0] if get_origin(annotation) is list else annotation
    return model


def _key(steps: Sequence[int | str]) -> str:
    """nodes.secondary[0].addr"""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{_shown(step)[1:-1]}" for step in steps)[1:]


def _ip(text: str) -> Any:
    try:
        return ip_address(text) if text.isprintable() else None
    except ValueError:
        return None


def _check_addresses(nodes: Sequence[NodeConfig]) -> None:
    taken: dict[tuple[str, int], str] = {}
    for node in nodes:
        place = (str(_ip(node.addr) or node.addr.lower().rstrip(".")), node.port)
        if place in taken:
            raise ConfigError(
                f"{node.key} is at {node.address}, where {taken[place]} is: give it another addr or communication.port"
            )
        taken[place] = node.key


def _check_agreement(config: NodesConfig) -> None:
    """All nodes have layers or none, and groups or none; no two have different dtypes: activations travel in one."""
    nodes = (config.starter, *config.pipeline)
    for key in ("layers", "group"):
        without = [node for node in nodes if getattr(node, key) is None]
        if 0 < len(without) < len(nodes):
            raise ConfigError(f"{without[0].key}.{key} is missing: all nodes have it, or none")
    _check_groups(config)
    given = [node for node in nodes if node.dtype]
    for node in given:
        if node.dtype != given[0].dtype:
            raise ConfigError(
                f"{node.key}.dtype must be {given[0].dtype}, as {given[0].key}.dtype is: got {node.dtype}"
            )


def _check_groups(config: NodesConfig) -> None:
    """The nodes of a group are neighbours, and have the same layers."""
    leads = dict[int | None, str]()
    for stage in config.stages:
        lead = stage[0]
        if lead.group is not None and lead.group in leads:
            raise ConfigError(
                f"{lead.key}.group is {lead.group}, as {leads[lead.group]}.group is, and a node between them has "
                "another: the nodes of a group are neighbours"
            )
        leads[lead.group] = lead.key
        for node in stage:
            if node.layers != lead.layers:
                raise ConfigError(
                    f"{node.key}.layers must be {lead.layers}, as {lead.key}.layers is, which is of the same group: "
                    f"got {node.layers}"
                )


def _shown(value: Any) -> str:
    if isinstance(value, int) and not -(10**12) < value < 10**12:
        return "a huge number"  # Python may refuse to print it
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    text = "NaN" if isinstance(value, float) and math.isnan(value) else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
