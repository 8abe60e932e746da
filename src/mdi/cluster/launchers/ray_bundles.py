"""What each node reserves on a Ray cluster (a bundle), and which machines have room. Arithmetic: knows no Ray."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mdi.core.errors import ConfigError

STRICT_SPREAD = "STRICT_SPREAD"
STRICT_PACK = "STRICT_PACK"
NODE_ID = "ray.io/node-id"  # a label that Ray gives each machine
MEMORY = "memory"  # in bytes, as in Ray
AMONG = re.compile(r"in\((.*)\)")


@dataclass(frozen=True)
class RayMachine:
    """A machine of the cluster, which Ray calls a node. id: Ray's. total, free: amounts by the name of the resource."""

    id: str
    name: str
    total: Mapping[str, float]
    free: Mapping[str, float]
    labels: Mapping[str, str]


@dataclass(frozen=True)
class Bundle:
    """What a node reserves: amounts by the name of the resource."""

    role: str
    amounts: Mapping[str, float]

    @property
    def threads(self) -> int:
        """CPU threads that its node computes with."""
        return max(1, int(self.amounts.get("CPU", 1)))

    @property
    def memory_gb(self) -> float:
        """Memory that its node may use, in 1e9 bytes."""
        return self.amounts[MEMORY] / 1e9


@dataclass(frozen=True)
class Placing:
    """How bundles may be placed. here: the id of the starter's machine. labels: selectors by label, as Ray has them."""

    strategy: str
    labels: Mapping[str, str]
    here: str

    @property
    def selectors(self) -> dict[str, str]:
        """Label selectors of each bundle."""
        elsewhere = {NODE_ID: f"!{self.here}"} if self.strategy == STRICT_SPREAD else {}
        return {**self.labels, **elsewhere}

    def allowed(self, machines: Sequence[RayMachine]) -> list[RayMachine]:
        """The machines that may get nodes: with the labels and, where each has its own, not the starter's."""
        return [machine for machine in machines if _selected(machine.labels, self.selectors)]


def count_nodes(machines: Sequence[RayMachine], asked: Mapping[str, float], placing: Placing) -> int:
    """The starter and one node for each other machine that has what is asked for."""
    others = [machine for machine in placing.allowed(machines) if machine.id != placing.here]
    return 1 + sum(_fits({"CPU": 1.0, **asked}, machine.total) for machine in others)


def make_bundles(
    memory_bytes: Mapping[str, float], asked: Mapping[str, float], machines: Sequence[RayMachine], placing: Placing
) -> list[Bundle]:
    """A bundle for each role. memory_bytes: what each takes by the plan.

    asked: replaces that, and the CPUs: as many as all that get a node have free, and at least one.
    """
    cpus = _cpus_for_all(len(memory_bytes), placing.allowed(machines))
    return [
        Bundle(role, {"CPU": cpus, MEMORY: float(int(size_bytes)), **asked})
        for role, size_bytes in memory_bytes.items()
    ]


def without_room(bundles: Sequence[Bundle], rooms: Sequence[Mapping[str, float]], placing: Placing) -> Bundle | None:
    """A bundle that finds no room, if there is one. rooms: what each allowed machine has.

    Exact where each bundle has a machine of its own, or all have one; otherwise some of what Ray finds stays unnoticed.
    """
    if placing.strategy == STRICT_SPREAD:
        return _without_own_room(bundles, rooms)
    if placing.strategy == STRICT_PACK:
        total = _added([bundle.amounts for bundle in bundles])
        return None if any(_fits(total, room) for room in rooms) else bundles[-1]
    for bundle in bundles:
        if not any(_fits(bundle.amounts, room) for room in rooms):
            return bundle
    return None if _fits(_added([bundle.amounts for bundle in bundles]), _added(rooms)) else bundles[-1]


def shown(amounts: Mapping[str, float]) -> str:
    """`CPU 8, memory 16.0 GB`."""
    return ", ".join(
        f"{name} {amount / 1e9:.1f} GB" if name == MEMORY else f"{name} {amount:g}" for name, amount in amounts.items()
    )


def shown_rooms(bundle: Bundle, machines: Sequence[RayMachine], *, free: bool) -> str:
    """What the machines have of what a bundle needs: `alpha (CPU 4, memory 7.5 GB), beta (...)`."""
    if not machines:
        return "none"
    rooms = [machine.free if free else machine.total for machine in machines]
    return ", ".join(
        f"{machine.name} ({shown({name: room.get(name, 0.0) for name in bundle.amounts})})"
        for machine, room in zip(machines, rooms, strict=True)
    )


def check_room(bundles: Sequence[Bundle], machines: Sequence[RayMachine], placing: Placing) -> None:
    """Raises ConfigError, with what is missing and what there is, when even an idle cluster could not hold them all."""
    allowed = placing.allowed(machines)
    lacking = without_room(bundles, [machine.total for machine in allowed], placing)
    if lacking is None:
        return
    own = ", on a machine of its own that is not the starter's" if placing.strategy == STRICT_SPREAD else ""
    labels = f" with the labels {', '.join(f'{name}={value}' for name, value in placing.labels.items())}"
    raise ConfigError(
        f"the Ray cluster is too small for {len(bundles)} nodes beside the starter: {lacking.role} needs "
        f"{shown(lacking.amounts)}{own}; the machines{labels if placing.labels else ''} are "
        f"{shown_rooms(lacking, allowed, free=False)}. Add machines (ray start --address=...), or ask for fewer nodes "
        "(--n-nodes) or for less (--ray-resources)"
    )


def _cpus_for_all(count: int, machines: Sequence[RayMachine]) -> float:
    """The CPUs that so many bundles can have alike; some share a machine where there are fewer."""
    if not machines:
        return 1.0
    free = sorted((machine.free.get("CPU", 0.0) for machine in machines), reverse=True)
    sharing = -(-count // len(free))
    return float(max(1, int(free[min(count, len(free)) - 1] // sharing)))


def _without_own_room(bundles: Sequence[Bundle], rooms: Sequence[Mapping[str, float]]) -> Bundle | None:
    """Matches bundles with machines, one with one (Kuhn's algorithm)."""
    taken: dict[int, Bundle] = {}  # by the index of the machine

    def place(bundle: Bundle, tried: set[int]) -> bool:
        for index, room in enumerate(rooms):
            if index not in tried and _fits(bundle.amounts, room):
                tried.add(index)
                if index not in taken or place(taken[index], tried):
                    taken[index] = bundle
                    return True
        return False

    return next((bundle for bundle in bundles if not place(bundle, set())), None)


def _fits(amounts: Mapping[str, float], room: Mapping[str, float]) -> bool:
    return all(room.get(name, 0.0) >= amount for name, amount in amounts.items())


def _added(rooms: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = {name for room in rooms for name in room}
    return {name: sum(room.get(name, 0.0) for room in rooms) for name in names}


def _selected(labels: Mapping[str, str], selectors: Mapping[str, str]) -> bool:
    """Whether a machine has the labels: `a`, `!a`, `in(a,b)` or `!in(a,b)`, as Ray's label selectors."""
    for name, selector in selectors.items():
        value = selector.removeprefix("!")
        among = AMONG.fullmatch(value)
        wanted = [item.strip() for item in among[1].split(",")] if among else [value]
        if (labels.get(name) in wanted) == selector.startswith("!"):
            return False
    return True
