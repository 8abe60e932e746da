"""What nodes reserve on a Ray cluster, and what is said where there is no room. No Ray runs."""

from __future__ import annotations

import itertools
import random

import pytest

from mdi.cluster.launchers.ray_bundles import (
    Bundle,
    Placing,
    RayMachine,
    check_room,
    count_nodes,
    make_bundles,
    shown_rooms,
    without_room,
)
from mdi.core.errors import ConfigError

SPREAD = Placing("STRICT_SPREAD", {}, "a")


def machine(name: str, cpus: float, memory_gb: float = 8.0, busy: float = 0, **more: float) -> RayMachine:
    total = {"CPU": cpus, "memory": memory_gb * 1e9, **more}
    labels = {"ray.io/node-id": name, "zone": name}
    return RayMachine(name, name, total, {**total, "CPU": cpus - busy}, labels)


MACHINES = [machine("a", 8), machine("b", 4), machine("c", 16)]


def test_each_node_gets_the_cpus_that_all_have_free() -> None:
    bundles = make_bundles({"secondary0": 1e9, "finisher": 2e9}, {}, MACHINES, SPREAD)
    assert [bundle.role for bundle in bundles] == ["secondary0", "finisher"]
    assert [bundle.amounts for bundle in bundles] == [{"CPU": 4, "memory": 1e9}, {"CPU": 4, "memory": 2e9}]
    assert [bundle.threads for bundle in bundles] == [4, 4]
    assert bundles[1].memory_gb == 2
    alone = make_bundles({"finisher": 2e9}, {}, MACHINES, SPREAD)
    assert alone[0].amounts["CPU"] == 16  # the other machine need not take part


def test_busy_machines_count_with_what_is_left_and_one_at_least() -> None:
    machines = [machine("a", 8), machine("b", 4, busy=1.5), machine("c", 16, busy=16)]
    assert make_bundles({"finisher": 0}, {}, machines, SPREAD)[0].amounts["CPU"] == 2
    assert make_bundles({"secondary0": 0, "finisher": 0}, {}, machines, SPREAD)[0].amounts["CPU"] == 1


def test_nodes_that_share_a_machine_share_its_cpus() -> None:
    pack = Placing("PACK", {}, "a")
    needs = {"secondary0": 1e9, "secondary1": 1e9, "finisher": 1e9}
    assert make_bundles(needs, {}, [machine("a", 9)], pack)[0].amounts["CPU"] == 3
    assert make_bundles(needs, {}, [], pack)[0].amounts["CPU"] == 1


def test_what_is_asked_for_replaces_the_plans() -> None:
    asked = {"CPU": 0.5, "memory": 3e9, "GPU": 1.0}
    bundle = make_bundles({"finisher": 1e9}, asked, MACHINES, SPREAD)[0]
    assert bundle.amounts == asked
    assert bundle.threads == 1


def test_a_node_for_each_other_machine_that_has_what_is_asked_for() -> None:
    assert count_nodes(MACHINES, {}, SPREAD) == 3
    assert count_nodes(MACHINES, {"CPU": 8}, SPREAD) == 2
    assert count_nodes(MACHINES, {"GPU": 1}, SPREAD) == 1
    assert count_nodes([*MACHINES, machine("d", 0)], {}, SPREAD) == 3  # a head without CPUs gets none


@pytest.mark.parametrize(
    ("selector", "allowed"), [("b", "b"), ("!b", "c"), ("in(b, c)", "bc"), ("!in(b,c)", ""), ("a", "")]
)
def test_labels_choose_machines_as_in_ray(selector: str, allowed: str) -> None:
    placing = Placing("STRICT_SPREAD", {"zone": selector}, "a")
    assert "".join(machine.id for machine in placing.allowed(MACHINES)) == allowed
    assert placing.selectors == {"zone": selector, "ray.io/node-id": "!a"}
    assert Placing("PACK", {"zone": selector}, "a").selectors == {"zone": selector}


def test_room_on_machines_of_their_own_is_found_exactly() -> None:
    draw = random.Random(3)
    for _ in range(300):
        rooms = [{"CPU": draw.randint(0, 3), "memory": draw.randint(0, 3)} for _ in range(draw.randint(0, 4))]
        bundles = [
            Bundle(f"secondary{index}", {"CPU": draw.randint(0, 3), "memory": draw.randint(0, 3)})
            for index in range(draw.randint(1, 4))
        ]
        possible = any(
            all(
                bundle.amounts[name] <= room[name] for bundle, room in zip(bundles, order, strict=True) for name in room
            )
            for order in itertools.permutations(rooms, len(bundles))
        )
        assert (without_room(bundles, rooms, SPREAD) is None) == possible


@pytest.mark.parametrize(
    ("strategy", "cpus", "room"),
    [
        ("PACK", [2, 2], True),
        ("PACK", [9, 1], False),
        ("SPREAD", [8, 8, 8, 8], False),
        ("STRICT_PACK", [8, 8], True),
        ("STRICT_PACK", [8, 9], False),
    ],
)
def test_room_on_shared_machines(strategy: str, cpus: list[int], room: bool) -> None:
    machines = [{"CPU": 8.0}, {"CPU": 8.0}] if strategy != "STRICT_PACK" else [{"CPU": 4.0}, {"CPU": 16.0}]
    bundles = [Bundle(str(index), {"CPU": count}) for index, count in enumerate(cpus)]
    assert (without_room(bundles, machines, Placing(strategy, {}, "")) is None) == room


def test_a_cluster_that_is_too_small_is_named_with_what_is_missing_and_what_is_there() -> None:
    bundles = make_bundles({"secondary0": 1e9, "finisher": 1e9}, {"GPU": 1, "CPU": 2}, MACHINES, SPREAD)
    with pytest.raises(ConfigError) as raised:
        check_room(bundles, MACHINES, SPREAD)
    assert str(raised.value) == (
        "the Ray cluster is too small for 2 nodes beside the starter: secondary0 needs CPU 2, memory 1.0 GB, GPU 1, on "
        "a machine of its own that is not the starter's; the machines are b (CPU 4, memory 8.0 GB, GPU 0), "
        "c (CPU 16, memory 8.0 GB, GPU 0). Add machines (ray start --address=...), or ask for fewer nodes (--n-nodes) "
        "or for less (--ray-resources)"
    )
    nowhere = Placing("PACK", {"zone": "x"}, "a")
    with pytest.raises(ConfigError, match="the machines with the labels zone=x are none"):
        check_room(bundles, MACHINES, nowhere)
    check_room(make_bundles({"finisher": 1e9}, {}, MACHINES, SPREAD), MACHINES, SPREAD)


def test_free_rooms_are_shown_apart_from_whole_machines() -> None:
    bundle = Bundle("finisher", {"CPU": 2})
    assert shown_rooms(bundle, [machine("b", 4, busy=3)], free=True) == "b (CPU 1)"
    assert shown_rooms(bundle, [machine("b", 4, busy=3)], free=False) == "b (CPU 4)"
