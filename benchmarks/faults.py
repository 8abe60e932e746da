"""A soak of random faults: nodes killed and frozen under running streams, every token compared with undisturbed ones.

    python -m benchmarks.faults                      # 100 faults, some minutes
    python -m benchmarks.faults --faults 2 --seconds 60

Faults: one node killed, two at once, one killed again while it comes back, another killed meanwhile, one frozen. The
seed decides them and the pauses in between. Exit code 1 for a lost request, a wrong token, or anything left behind.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from mdi import Engine, SamplingParams
from mdi.checkpoint.synthetic import tiny_config, write_random_checkpoint
from mdi.cluster.recovery import RecoveryLimits
from mdi.demo import picture
from mdi.errors import MDIError

N_NODES = 4
N_CLIENTS = 8
LONGEST_PAUSE_S = 2.0
POLL_S = 0.01
LIMITS = RecoveryLimits(timeout_s=300, max_losses=10**6)
KINDS = ("kill", "kill two", "kill again", "kill another meanwhile", "freeze")
Request = tuple[Any, SamplingParams]
console = Console()


@dataclass
class Count:
    """What became of the requests."""

    right: int = 0
    wrong: int = 0
    lost: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Recovery:
    """Seconds from a fault until it was noticed, until all weights were loaded again, until streams went on."""

    kind: str
    noticed_s: float
    loaded_s: float
    back_s: float

    @property
    def own_s(self) -> float:
        """Without starting a process and loading its chunk."""
        return self.back_s - (self.loaded_s - self.noticed_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=1800, help="no new fault after this time")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mdi-faults-") as folder:
        path = write_random_checkpoint(Path(folder) / "random-tiny", tiny_config())
        with Engine(path, n_nodes=N_NODES, sequence_length=2048, recovery_limits=LIMITS) as engine:
            count, recoveries, left = soak(engine, options.faults, options.seconds, random.Random(options.seed))
    left += [f"process {child.pid}" for child in psutil.Process().children(recursive=True)]
    report(count, recoveries, left)
    sys.exit(bool(count.wrong or count.lost or left))


def soak(engine: Engine, n_faults: int, seconds: float, rng: random.Random) -> tuple[Count, list[Recovery], list[str]]:
    """The requests' fate, the recoveries, and what was left behind."""
    requests = questions()
    expected = [engine.submit(*request).completion().token_ids for request in requests]
    descriptors = psutil.Process().num_fds()
    count, stop = Count(), threading.Event()
    numbers = itertools.count()
    clients = [
        threading.Thread(target=client, args=(engine, requests, expected, numbers, count, stop))
        for _ in range(N_CLIENTS)
    ]
    for thread in clients:
        thread.start()
    deadline = time.monotonic() + seconds
    recoveries = list[Recovery]()
    try:
        while len(recoveries) < n_faults and time.monotonic() < deadline and not engine.error:
            time.sleep(rng.uniform(0, LONGEST_PAUSE_S))
            recoveries.append(strike(engine, rng.choice(KINDS), rng))
    finally:
        stop.set()
        for thread in clients:
            thread.join()
    return count, recoveries, left_behind(engine, descriptors)


def questions() -> list[Request]:
    """Short and long prompts, with and without a picture, greedy and sampled."""
    about = [{"role": "user", "content": [{"type": "image", "image": picture()}, {"type": "text", "text": "What?"}]}]
    prompts: list[Any] = ["Hello", "many words " * 100, about, "a list of " * 40]
    return [
        (prompt, SamplingParams(temperature=seed % 2, seed=seed, max_tokens=60 + 20 * seed))
        for seed, prompt in enumerate(prompts * 3)
    ]


def client(
    engine: Engine,
    requests: list[Request],
    expected: list[tuple[int, ...]],
    numbers: itertools.count[int],
    count: Count,
    stop: threading.Event,
) -> None:
    """One question after the other, until told to stop."""
    while not stop.is_set():
        number = next(numbers) % len(requests)
        try:
            tokens = engine.submit(*requests[number]).completion().token_ids
        except MDIError as error:
            count.lost.append(str(error))
            time.sleep(1)
            continue
        count.right += tokens == expected[number]
        count.wrong += tokens != expected[number]


def strike(engine: Engine, kind: str, rng: random.Random) -> Recovery:
    """One fault, and the time until all is well again."""
    pids = [node.pid for node in engine.nodes()[1:]]
    victims = rng.sample(pids, 2)
    before, started_s = engine.recovery.recoveries, time.monotonic()
    os.kill(victims[0], signal.SIGSTOP if kind == "freeze" else signal.SIGKILL)
    if kind == "kill two":
        os.kill(victims[1], signal.SIGKILL)
    wait_until(lambda: engine.recovery.recoveries > before or engine.error)
    noticed_s = time.monotonic() - started_s
    if kind == "kill again":
        wait_until(lambda: node_pids() - {*pids})
        os.kill((node_pids() - {*pids}).pop(), signal.SIGKILL)
    if kind == "kill another meanwhile":
        os.kill(victims[1], signal.SIGKILL)
    loaded_s = 0.0
    while engine.recovery.recovering or engine.recovery.recoveries == before:
        if not loaded_s and all(node.state in ("loaded", "ready") for node in engine.nodes()):
            loaded_s = time.monotonic() - started_s
        time.sleep(POLL_S)
    back_s = time.monotonic() - started_s
    wait_until(lambda: all(node.state == "ready" for node in engine.nodes()) or engine.error)
    return Recovery(kind, noticed_s, loaded_s or back_s, back_s)


def wait_until(condition: Any) -> None:
    while not condition():
        time.sleep(POLL_S)


def node_pids() -> set[int]:
    children = psutil.Process().children()
    return {child.pid for child in children if child.status() != psutil.STATUS_ZOMBIE}


def left_behind(engine: Engine, descriptors: int) -> list[str]:
    """What should not be there when all requests have ended."""
    left = [f"request {request}" for request in engine._requests]
    scheduler = engine._loop._scheduler
    left += [f"{scheduler.running} taken slots"] * bool(scheduler.running)
    gc.collect()  # calls of gRPC refer to themselves, and hold on to their connections
    deadline = time.monotonic() + 10
    while (more := psutil.Process().num_fds() - descriptors) > 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    left += [f"{more} file descriptors"] * (more > 2)
    left += [f"{len(node_pids())} node processes"] * (len(node_pids()) != N_NODES - 1)
    return left


def report(count: Count, recoveries: list[Recovery], left: list[str]) -> None:
    table = Table(
        "fault", "times", "noticed", "started and loaded", "the rest", "in all", "worst", title="seconds, median"
    )
    for kind in KINDS:
        of_kind = [recovery for recovery in recoveries if recovery.kind == kind]
        if of_kind:
            columns = (
                [recovery.noticed_s for recovery in of_kind],
                [recovery.loaded_s - recovery.noticed_s for recovery in of_kind],
                [recovery.back_s - recovery.loaded_s for recovery in of_kind],
                [recovery.back_s for recovery in of_kind],
            )
            medians = [f"{statistics.median(column):.2f}" for column in columns]
            table.add_row(kind, str(len(of_kind)), *medians, f"{max(columns[-1]):.2f}")
    console.print(table)
    own = [recovery.own_s for recovery in recoveries if recovery.kind != "freeze"]
    if own:
        console.print(f"recovery time beyond loading: median {statistics.median(own):.2f} s, worst {max(own):.2f} s")
    console.print(f"{len(recoveries)} faults, {count.right} right answers")
    console.print(f"lost requests: {len(count.lost)} {count.lost[:3] if count.lost else ''}")
    console.print(f"wrong tokens: in {count.wrong} answers")
    console.print(f"left behind: {', '.join(left) or 'nothing'}")


if __name__ == "__main__":
    main()
