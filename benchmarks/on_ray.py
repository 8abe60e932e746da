"""What Ray costs: decode and prefill over nodes that it placed, against nodes of `--n-nodes`, by turns in one run.

    pip install -e '.[bench,dev]'
    python -m benchmarks.on_ray            # the exact Qwen2-VL-2B shape in int4: 10 GB of memory, some ten minutes
    python -m benchmarks.on_ray --tiny     # the same steps on a tiny model: a minute

Both have three nodes of one thread each on this machine, and encrypted links. Ray starts its workers at nice 15 unless
told otherwise, which a busy machine would show: here they have the priority of the others.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from operator import attrgetter
from pathlib import Path
from statistics import median
from typing import Any

from testing.ray_cluster import ray_cluster

from benchmarks.figures import Figure, report
from benchmarks.formats import FORMATS, engine_settings, random_checkpoint
from mdi import Engine
from mdi.bench.measure import Run, measure
from mdi.bench.scenario import Scenario

N_NODES = 3
TURNS = 7
LEAST = 0.98  # of the rate without Ray


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("checkpoints"), help="where the random checkpoint is kept")
    parser.add_argument("--tiny", action="store_true", help="a tiny model instead, to try the benchmark itself")
    parser.add_argument("--turns", type=int, default=TURNS, help="of each side, of which the median counts")
    parser.add_argument("--json", type=Path, help="write the table there, too")
    options = parser.parse_args()
    path = random_checkpoint(options.folder, "tiny" if options.tiny else "2b")
    report(figures(path, options.tiny, options.turns), f"{path.name}, {N_NODES} nodes on Ray and not", options.json)


def figures(path: Path, tiny: bool, turns: int) -> Iterator[Figure]:
    """Decoding of one and of four streams, and the first token of a long prompt."""
    os.environ |= {"RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    answer = 16 if tiny else 32
    prefill = Scenario(1, 64 if tiny else 1000, None, 2)
    with ray_cluster(N_NODES - 1, cpus=1) as cluster, started(path) as local, started(path, cluster.address) as placed:
        for streams in (1, 4):
            without, on_ray = by_turns(
                local, placed, Scenario(streams, 32, None, answer), turns, attrgetter("decode_rate")
            )
            behind = f"without Ray {without:.2f}"
            yield Figure(
                "int4", f"decode, streams: {streams}", f"{on_ray:.2f} tokens/s", behind, on_ray / without, LEAST
            )
        without, on_ray = by_turns(local, placed, prefill, turns, attrgetter("first_token_s"))
        work, behind = f"first of {prefill.prompt_tokens} tokens", f"without Ray {without:.3f}"
        yield Figure("int4", work, f"{on_ray:.3f} s", behind, without / on_ray, LEAST)


def started(path: Path, ray: str | None = None) -> Engine:
    """Three nodes of one thread, on Ray if its address is given."""
    placing: dict[str, Any] = {"ray": ray, "ray_resources": {"CPU": 1, "memory": 4e9}} if ray else {}
    settings: dict[str, Any] = {"dtype": "bfloat16", "sequence_length": 2048, "max_sequences": 4, "encryption": True}
    return Engine(path, n_nodes=N_NODES, **settings, **engine_settings(FORMATS["int4"]), **placing)


def by_turns(
    local: Engine, placed: Engine, scenario: Scenario, turns: int, value: Callable[[Run], float]
) -> tuple[float, float]:
    """The median of each side's runs, which take turns, after one of each that does not count."""
    runs = [[measure(side, scenario, seed=seed) for side in (local, placed)] for seed in range(turns + 1)]
    without, on_ray = (median(map(value, side)) for side in zip(*runs[1:], strict=True))
    return without, on_ray


if __name__ == "__main__":
    main()
