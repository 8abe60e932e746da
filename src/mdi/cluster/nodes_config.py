"""The nodes-config: which node is on which machine. One JSON file, checked key by key; knows no sockets and no models.

    {"nodes": {"starter":   {"addr": "10.0.0.1", "communication": {"port": 5000}},
               "secondary": [{"addr": "10.0.0.2", "communication": {"port": 5000}, "device": "cuda"}, ...],
               "finisher":  {...}, "vision": {...}, "spare": [{...}, ...]}}

Without a finisher, the last secondary is it. What upstream's files have besides is accepted and ignored: `inference`,
`starter_server`, and `starter_addr` in `communication`.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from mdi.core.dtypes import DTYPE_NAMES
from mdi.core.errors import ConfigError
from mdi.rpc.authority import HOST_NAME

MAX_FILE_BYTES = 2**20
MAX_NODES = 1024


@dataclass(frozen=True)
class NodeConfig:
    """One node. name: its role, as its chunk has it (starter, secondary0, finisher). key: where the file names it.

    device, dtype, threads: as `mdi secondary` takes them; None leaves them to it. memory_gb: most it may use, in 1e9
    bytes. layers: how many decoder layers it gets; all nodes have that, or none.
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
        config = _read_nodes(document)
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
    def layers(self) -> tuple[int, ...] | None:
        """Layers per node, starter first; None when they are left to the plan."""
        counts = tuple(node.layers for node in (self.starter, *self.pipeline) if node.layers is not None)
        return counts or None

    def check_layers(self, n_layers: int) -> None:
        """Raises ConfigError unless the layers per node, where given, are those of a model of `n_layers`."""
        if self.layers and sum(self.layers) != n_layers:
            text = " + ".join(map(str, self.layers))
            raise ConfigError(
                f"nodes.*.layers add up to {text} = {sum(self.layers)}, but the model has {n_layers} layers"
            )
        if self.n_nodes > n_layers:
            raise ConfigError(f"nodes names {self.n_nodes} nodes, more than the model's {n_layers} layers")

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
    return value


class _Object:
    """A JSON object at a place in the file, whose known keys are taken from it; others are refused."""

    def __init__(self, value: Any, key: str, known: Sequence[str]) -> None:
        if not isinstance(value, dict):
            raise ConfigError(f"{key or 'the file'} must be an object, got {_shown(value)}")
        self._value = value
        self.key = key
        for name in value:
            if name not in known:
                near = get_close_matches(name, known, 1)
                hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(known)}"
                raise ConfigError(f"{self.at(_shown(name)[1:-1])} is unknown: {hint}")

    def at(self, name: str) -> str:
        return f"{self.key}.{name}" if self.key else name

    def has(self, name: str) -> bool:
        return name in self._value

    def get(self, name: str) -> Any:
        if name not in self._value:
            raise ConfigError(f"{self.at(name)} is missing")
        return self._value[name]

    def items(self, name: str) -> list[Any]:
        value = self._value.get(name, [])
        if not isinstance(value, list):
            raise ConfigError(f"{self.at(name)} must be a list of nodes, got {_shown(value)}")
        if len(value) > MAX_NODES:
            raise ConfigError(f"{self.at(name)} must have at most {MAX_NODES} nodes, got {len(value)}")
        return value

    def whole(self, name: str, low: int, high: int) -> int:
        value = self.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ConfigError(f"{self.at(name)} must be a whole number from {low} to {high}, got {_shown(value)}")
        return value

    def whole_or_none(self, name: str, low: int, high: int) -> int | None:
        return self.whole(name, low, high) if self.has(name) else None

    def positive_or_none(self, name: str) -> float | None:
        if not self.has(name):
            return None
        value = self.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
            raise ConfigError(f"{self.at(name)} must be a number above 0, got {_shown(value)}")
        return float(value)

    def text_or_none(self, name: str) -> str | None:
        if not self.has(name):
            return None
        value = self.get(name)
        if not isinstance(value, str) or not value.isascii() or not value.isprintable() or not value.strip():
            raise ConfigError(f"{self.at(name)} must be a word, got {_shown(value)}")
        return value

    def choice_or_none(self, name: str, choices: Sequence[str]) -> str | None:
        value = self.text_or_none(name)
        if value is not None and value not in choices:
            raise ConfigError(f"{self.at(name)} must be one of {', '.join(choices)}, got {_shown(value)}")
        return value


def _read_nodes(document: Any) -> NodesConfig:
    file = _Object(document, "", ["nodes"])
    nodes = _Object(file.get("nodes"), "nodes", ["starter", "secondary", "finisher", "vision", "spare"])
    after = [(f"nodes.secondary[{index}]", value) for index, value in enumerate(nodes.items("secondary"))]
    if nodes.has("finisher"):
        after.append(("nodes.finisher", nodes.get("finisher")))
    names = [*(f"secondary{index}" for index in range(len(after) - 1)), "finisher"]
    return NodesConfig(
        starter=_read_node("starter", "nodes.starter", nodes.get("starter")),
        pipeline=tuple(_read_node(name, key, value) for name, (key, value) in zip(names, after, strict=False)),
        vision=_read_node("vision", "nodes.vision", nodes.get("vision")) if nodes.has("vision") else None,
        spares=tuple(
            _read_node(f"spare{index}", f"nodes.spare[{index}]", value)
            for index, value in enumerate(nodes.items("spare"))
        ),
    )


def _read_node(name: str, key: str, value: Any) -> NodeConfig:
    known = ["addr", "communication", "device", "dtype", "threads", "memory_gb", "inference", "starter_server"]
    holds_layers = name != "vision" and not key.startswith("nodes.spare")
    node = _Object(value, key, [*known, "layers"] if holds_layers else known)
    communication = _Object(node.get("communication"), f"{key}.communication", ["port", "starter_addr"])
    return NodeConfig(
        name=name,
        key=key,
        addr=_address(node.get("addr"), node.at("addr")),
        port=communication.whole("port", 1, 65535),
        device=node.text_or_none("device"),
        dtype=node.choice_or_none("dtype", DTYPE_NAMES),
        threads=node.whole_or_none("threads", 1, 4096),
        memory_gb=node.positive_or_none("memory_gb"),
        layers=node.whole_or_none("layers", 1, 100_000),
    )


def _address(value: Any, key: str) -> str:
    """A host's name or IP address, as others reach it."""
    if not isinstance(value, str) or not value.isascii() or not (_ip(value) or HOST_NAME.fullmatch(value)):
        raise ConfigError(f"{key} must be a host's name or IP address, without port, got {_shown(value)}")
    found = _ip(value)
    if found and (found.is_unspecified or found.is_multicast):
        raise ConfigError(f"{key} must be an address that the other nodes can reach, not {value}")
    return value


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
    """All nodes have layers or none, and no two have different dtypes: activations travel in one."""
    stages = (config.starter, *config.pipeline)
    without = [node for node in stages if node.layers is None]
    if config.layers and without:
        raise ConfigError(f"{without[0].key}.layers is missing: all nodes have it, or none")
    given = [node for node in stages if node.dtype]
    for node in given:
        if node.dtype != given[0].dtype:
            raise ConfigError(
                f"{node.key}.dtype must be {given[0].dtype}, as {given[0].key}.dtype is: got {node.dtype}"
            )


def _shown(value: Any) -> str:
    if isinstance(value, int) and not -(10**12) < value < 10**12:
        return "a huge number"  # more digits than Python prints, maybe
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    text = "NaN" if isinstance(value, float) and math.isnan(value) else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
