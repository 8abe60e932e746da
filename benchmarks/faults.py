"""Random faults under running streams: nodes are killed and frozen, and every token is compared with undisturbed ones.

    python -m benchmarks.faults                      # 100 faults, 15 minutes
    python -m benchmarks.faults --faults 2 --seconds 60
    python -m benchmarks.faults --manual             # manual launcher, encrypted, one host a node; Linux, as root
    python -m benchmarks.faults --dtype float32      # the bundled model in another type than its own
    python -m benchmarks.faults --constrained        # every answer is a JSON array of a schema
    python -m benchmarks.faults --groups 2,2 --faults 200    # two stages of two ranks; half an hour

Faults: one node killed, two at once, one killed again while it comes back, another killed meanwhile, one frozen; with
--manual also a cable that is cut for a while. There, a killed node is started again at once, as systemd does, and a
frozen one continues when the fault is noticed. The seed decides the faults and the pauses between them. A fault begins
when all nodes have been ready for a while, and is over when a node it hit was lost and all are ready again: losses of
other nodes are counted, and are not taken for its own. Exit code 1 for a lost request, a wrong token, a fault that is
not noticed or not over in time, and for anything left behind.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import jsonschema
import numpy as np
import psutil
from rich.console import Console
from rich.progress import track
from rich.table import Table
from testing.hosts import Host, Network, why_not
from testing.manual_cluster import ManualCluster, Place
from testing.waiting import wait_for

from mdi import Engine, SamplingParams
from mdi.bench.scenario import noise
from mdi.checkpoint.bundled import unpack
from mdi.checkpoint.prepare import prepare
from mdi.checkpoint.source import open_source
from mdi.core.config import RecoveryLimits
from mdi.core.constraint import Constraint, json_rule
from mdi.core.errors import MDIError

N_NODES = 4
N_CLIENTS = 8
PORT = 5000
LONGEST_PAUSE_S = 2.0
QUIET_S = 1.5  # longer than a heartbeat: what one fault left behind is not the next one's
NOTICED_LIMIT_S = 30.0
FAULT_LIMIT_S = 100.0  # from a fault until all is well again
POLL_S = 0.01
LIMITS = RecoveryLimits(recovery_timeout_s=300, max_losses=10**6)
KINDS = ("kill", "kill two", "kill again", "kill another meanwhile", "freeze")
CABLE = "cut a cable"
Request = tuple[Any, SamplingParams, Constraint | None]
FIGURES = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {
            "shape": {"enum": ["circle", "square", "triangle"]},
            "count": {"type": "integer", "minimum": 0, "maximum": 99},
            "name": {"type": "string", "maxLength": 12},
        },
        "required": ["shape", "count", "name"],
        "additionalProperties": False,
    },
    "minItems": 5,
    "maxItems": 9,
}
console = Console()


@dataclass
class Count:
    """Requests by their outcome. tokens: that were compared. wrong: how answers differ. lost: error messages."""

    right: int = 0
    tokens: int = 0
    wrong: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Recovery:
    """Seconds from a fault until it is noticed, until all weights are loaded again, and until streams continue.

    losses: of this fault, as the engine counts them.
    """

    kind: str
    losses: int
    noticed_s: float
    loaded_s: float
    back_s: float

    @property
    def own_s(self) -> float:
        """Without the time for starting a process and loading its chunk."""
        return self.back_s - (self.loaded_s - self.noticed_s)


class Nodes(Protocol):
    """The nodes after the starter, and the faults that they can have."""

    @property
    def names(self) -> Sequence[str]: ...

    @property
    def kinds(self) -> Sequence[str]: ...

    def kill(self, name: str) -> None: ...

    def kill_again(self, name: str) -> None:
        """Kills a node that was killed, as soon as it has been started again."""

    def disturb(self, kind: str, name: str) -> None:
        """Freezes a node, or cuts its cable."""

    def relieve(self, kind: str, name: str) -> None:
        """Ends the fault, after it was noticed."""


class LocalNodes:
    """Nodes of the local launcher, which starts them again."""

    kinds = KINDS

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.names = [node.name for node in engine.nodes()[1:]]
        self._before: set[int] = set()

    def kill(self, name: str) -> None:
        self._before = node_pids()
        os.kill(self._pid(name), signal.SIGKILL)

    def kill_again(self, name: str) -> None:
        wait_for(lambda: node_pids() - self._before, NOTICED_LIMIT_S)
        os.kill((node_pids() - self._before).pop(), signal.SIGKILL)

    def disturb(self, kind: str, name: str) -> None:
        os.kill(self._pid(name), signal.SIGSTOP)

    def relieve(self, kind: str, name: str) -> None:
        """The launcher has killed the node."""

    def _pid(self, name: str) -> int:
        return next(node.pid for node in self._engine.nodes() if node.name == name)


class HostNodes:
    """Nodes of the manual launcher, one a host, which are started again at once when they are killed."""

    kinds = (*KINDS, CABLE)

    def __init__(self, nodes: ManualCluster, hosts: dict[str, Host]) -> None:
        self.names = nodes.names
        self._nodes = nodes
        self._hosts = hosts

    def kill(self, name: str) -> None:
        self._nodes.process(name).kill()
        self._nodes.start(name)

    kill_again = kill

    def disturb(self, kind: str, name: str) -> None:
        if kind == CABLE:
            self._hosts[name].cut()
        else:
            self._nodes.process(name).popen.send_signal(signal.SIGSTOP)

    def relieve(self, kind: str, name: str) -> None:
        if kind == CABLE:
            self._hosts[name].heal()
        else:
            self._nodes.process(name).popen.send_signal(signal.SIGCONT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=math.inf, help="no new fault after this time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--manual", action="store_true", help="manual launcher, encrypted, one host a node")
    parser.add_argument("--dtype", help="what the bundled model computes in; its own is bfloat16")
    parser.add_argument("--constrained", action="store_true", help="answers follow a JSON schema")
    parser.add_argument("--groups", help="the ranks of each stage, four nodes in all: 2,2")
    parser.add_argument("--kinds", nargs="+", choices=(*KINDS, CABLE), help="these faults alone")
    options = parser.parse_args()
    if options.manual and (reason := why_not()):
        sys.exit(reason)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mdi-faults-")))
        path = unpack(folder / "bundled")
        if options.manual:
            engine, nodes = manual(path, options.dtype, folder, stack)
        else:
            groups = tuple(map(int, options.groups.split(","))) if options.groups else (1,) * N_NODES
            engine, nodes = local(path, options.dtype, groups, stack)
        kinds, requests = options.kinds or nodes.kinds, constrained() if options.constrained else questions()
        count, recoveries, left = soak(
            engine, requests, nodes, kinds, options.faults, options.seconds, random.Random(options.seed)
        )
    left += [f"process {child.pid}" for child in psutil.Process().children(recursive=True)]
    report(count, recoveries, left, options.faults)
    sys.exit(bool(count.wrong or count.lost or left))


def local(path: Path, dtype: str | None, groups: tuple[int, ...], stack: ExitStack) -> tuple[Engine, Nodes]:
    engine = stack.enter_context(Engine(path, groups=groups, dtype=dtype, sequence_length=2048, recovery=LIMITS))
    return engine, LocalNodes(engine)


def manual(path: Path, dtype: str | None, folder: Path, stack: ExitStack) -> tuple[Engine, Nodes]:
    """An engine in this process, which is on the first host until the stack ends."""
    names = ["starter", *(f"secondary{index}" for index in range(N_NODES - 2)), "finisher"]
    network = stack.enter_context(Network(*names))
    places = {name: Place(host.address, PORT, host.inside) for name, host in network.hosts.items()}
    chunks = prepare(open_source(path), N_NODES, dtype=dtype)
    nodes = stack.enter_context(ManualCluster(folder, places, chunks=chunks, encrypted=True))
    nodes.start_all()
    stack.enter_context(network.hosts["starter"].inside())  # threads that are made from now on are there, too
    running = Engine(
        path,
        nodes_config=nodes.config,
        certs=nodes.certs("starter"),
        encryption=True,
        dtype=dtype,
        sequence_length=2048,
        recovery=LIMITS,
    )
    return stack.enter_context(running), HostNodes(nodes, network.hosts)


def soak(
    engine: Engine,
    requests: list[Request],
    nodes: Nodes,
    kinds: Sequence[str],
    n_faults: int,
    seconds: float,
    rng: random.Random,
) -> tuple[Count, list[Recovery], list[str]]:
    """The requests' outcomes, the recoveries, and what was left behind or did not end in time."""
    expected = [answer(engine, request) for request in requests]
    descriptors, processes = psutil.Process().num_fds(), len(node_pids())
    count, stop = Count(), threading.Event()
    numbers = itertools.count()
    clients = [
        threading.Thread(target=client, args=(engine, requests, expected, numbers, count, stop), daemon=True)
        for _ in range(N_CLIENTS)
    ]
    for thread in clients:
        thread.start()
    deadline = time.monotonic() + seconds
    recoveries, unfinished = list[Recovery](), list[str]()
    try:
        for _ in track(range(n_faults), "faults", console=Console(stderr=True)):
            time.sleep(rng.uniform(0, LONGEST_PAUSE_S))
            recoveries.append(strike(engine, nodes, rng.choice(kinds), rng))
            if time.monotonic() > deadline or engine.error:
                break
        wait_for_quiet(engine)
    except AssertionError as error:
        unfinished.append(f"fault {len(recoveries) + 1}: {error}")
    finally:
        stop.set()
        end = time.monotonic() + FAULT_LIMIT_S
        for thread in clients:
            thread.join(max(0.0, end - time.monotonic()))
    return count, recoveries, unfinished + left_behind(engine, descriptors, processes)


def questions() -> list[Request]:
    """Short and long prompts, with and without a picture, greedy and sampled."""
    about = [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": noise(224, np.random.default_rng(1))},
                {"type": "text", "text": "What?"},
            ],
        }
    ]
    prompts: list[Any] = ["Hello", "many words " * 100, about, "a list of " * 40]
    return [
        (prompt, SamplingParams(temperature=seed % 2, seed=seed, min_tokens=n_tokens, max_tokens=n_tokens), None)
        for seed, prompt in enumerate(prompts * 3)
        for n_tokens in [60 + 20 * seed]
    ]


def constrained() -> list[Request]:
    """Arrays of a schema, greedy and sampled, of some 150 tokens each."""
    figures = Constraint(f"start: {json_rule(FIGURES)}", "figures")
    return [("List figures.", SamplingParams(temperature=seed % 2, seed=seed), figures) for seed in range(8)]


def answer(engine: Engine, request: Request) -> tuple[int, ...]:
    """The tokens of an answer. Raises ValidationError for one that does not follow its schema."""
    prompt, params, constraint = request
    completion = engine.submit(prompt, params, constraint=constraint).completion()
    if constraint:
        assert completion.finish_reason == "stop"
        jsonschema.validate(json.loads(completion.text), FIGURES)
    return completion.token_ids


def client(
    engine: Engine,
    requests: list[Request],
    expected: list[tuple[int, ...]],
    numbers: itertools.count[int],
    count: Count,
    stop: threading.Event,
) -> None:
    """Submits one request after the other until `stop` is set."""
    while not stop.is_set():
        number = next(numbers) % len(requests)
        try:
            tokens = answer(engine, requests[number])
        except MDIError as error:
            count.lost.append(str(error))
            time.sleep(1)
            continue
        count.tokens += len(tokens)
        count.right += tokens == expected[number]
        if tokens != expected[number]:
            count.wrong.append(difference(number, requests[number], tokens, expected[number]))


def difference(number: int, request: Request, tokens: Sequence[int], expected: Sequence[int]) -> str:
    pairs = zip(tokens, expected, strict=False)
    first = next((place for place, pair in enumerate(pairs) if pair[0] != pair[1]), min(len(tokens), len(expected)))
    return f"request {number} at temperature {request[1].temperature:g} from token {first} of {len(expected)} on"


def strike(engine: Engine, nodes: Nodes, kind: str, rng: random.Random) -> Recovery:
    """One fault, and the time until all is well again. Raises AssertionError when that takes too long."""
    victim, other = rng.sample(nodes.names, 2)
    hit = {victim, other} if kind == "kill two" else {victim}
    wait_for_quiet(engine)
    losses, recoveries, started_s = restarts(engine, hit), engine.recovery.recoveries, time.monotonic()

    def waited(condition: Callable[[], bool], limit_s: float, what: str) -> float:
        while not condition():
            assert time.monotonic() - started_s < limit_s, f"{kind} {victim}: not {what} within {limit_s:g} s"
            time.sleep(POLL_S)
        return time.monotonic() - started_s

    if kind in ("freeze", CABLE):
        nodes.disturb(kind, victim)
    else:
        nodes.kill(victim)
    if kind == "kill two":
        nodes.kill(other)
    noticed_s = waited(lambda: restarts(engine, hit) > losses, NOTICED_LIMIT_S, "noticed")
    if kind in ("freeze", CABLE):
        nodes.relieve(kind, victim)
    if kind == "kill again":
        nodes.kill_again(victim)
    if kind == "kill another meanwhile":
        nodes.kill(other)
    loaded_s = waited(lambda: all(node.state in ("loaded", "ready") for node in engine.nodes()), FAULT_LIMIT_S, "up")
    back_s = waited(lambda: not engine.recovery.recovering, FAULT_LIMIT_S, "over")
    wait_for_quiet(engine)
    return Recovery(kind, engine.recovery.recoveries - recoveries, noticed_s, loaded_s, back_s)


def restarts(engine: Engine, names: set[str]) -> int:
    """How often these nodes were lost."""
    return sum(node.restarts for node in engine.nodes() if node.name in names)


def wait_for_quiet(engine: Engine) -> None:
    """Until all nodes have been ready for a while, without a loss. Raises AssertionError when they are not in time."""
    deadline = time.monotonic() + FAULT_LIMIT_S
    quiet_since, recoveries = time.monotonic(), engine.recovery.recoveries
    while time.monotonic() < quiet_since + QUIET_S:
        ready = all(node.state == "ready" for node in engine.nodes())
        if not ready or engine.recovery.recovering or engine.recovery.recoveries != recoveries:
            quiet_since, recoveries = time.monotonic(), engine.recovery.recoveries
        assert time.monotonic() < deadline, f"the nodes are not ready within {FAULT_LIMIT_S:g} s"
        time.sleep(POLL_S)


def node_pids() -> set[int]:
    children = psutil.Process().children()
    return {child.pid for child in children if child.status() != psutil.STATUS_ZOMBIE}


def left_behind(engine: Engine, descriptors: int, processes: int) -> list[str]:
    """Requests, slots, files and processes that are there when all requests have ended."""
    left = [f"request {request}" for request in engine._requests]
    scheduler = engine._loop._scheduler
    left += [f"{scheduler.running} taken slots"] * bool(scheduler.running)
    gc.collect()  # calls of gRPC refer to themselves, and hold on to their connections
    deadline = time.monotonic() + 10
    while (more := psutil.Process().num_fds() - descriptors) > 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    left += [f"{more} file descriptors"] * (more > 2)
    left += [f"{len(node_pids())} processes instead of {processes}"] * (len(node_pids()) != processes)
    return left


def report(count: Count, recoveries: list[Recovery], left: list[str], n_faults: int) -> None:
    table = Table(
        "fault",
        "times",
        "losses",
        "noticed",
        "started and loaded",
        "the rest",
        "in all",
        "95th",
        "worst",
        title="seconds, median",
    )
    for kind in (*KINDS, CABLE):
        of_kind = [recovery for recovery in recoveries if recovery.kind == kind]
        if of_kind:
            columns = (
                [recovery.noticed_s for recovery in of_kind],
                [recovery.loaded_s - recovery.noticed_s for recovery in of_kind],
                [recovery.back_s - recovery.loaded_s for recovery in of_kind],
                [recovery.back_s for recovery in of_kind],
            )
            medians = [f"{statistics.median(column):.2f}" for column in columns]
            times, losses = str(len(of_kind)), str(sum(recovery.losses for recovery in of_kind))
            table.add_row(kind, times, losses, *medians, f"{percentile95(columns[-1]):.2f}", f"{max(columns[-1]):.2f}")
    console.print(table)
    own = [recovery.own_s for recovery in recoveries if recovery.kind not in ("freeze", CABLE)]
    if own:
        console.print(f"recovery time beyond loading: median {statistics.median(own):.2f} s, worst {max(own):.2f} s")
    whole = [recovery.back_s for recovery in recoveries]
    if whole:
        console.print(f"from a fault on: median {statistics.median(whole):.2f} s, 95th {percentile95(whole):.2f} s")
    answers = count.right + len(count.wrong)
    console.print(f"{len(recoveries)} of {n_faults} faults, {answers} answers and {count.tokens} tokens compared")
    console.print(f"lost requests: {len(count.lost)} {count.lost[:3] if count.lost else ''}")
    console.print(f"wrong tokens: in {len(count.wrong)} answers {'; '.join(count.wrong[:10])}")
    console.print(f"left behind: {', '.join(left) or 'nothing'}")


def percentile95(values: Sequence[float]) -> float:
    return sorted(values)[math.ceil(0.95 * len(values)) - 1]


if __name__ == "__main__":
    main()
