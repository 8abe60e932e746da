"""What plans predict and what then runs: one node, layers over two nodes, and a group of two, of one core each.

    python -m benchmarks.plans                                # the exact Qwen2-VL-2B in int4
    python -m benchmarks.plans --shape 7b --links 0.2 0.5 1   # and a group whose ranks are so many ms apart, at 1 Gb/s
    python -m benchmarks.plans --shape tiny --answer 8 --turns 1 --links 0.2     # the same steps: a minute

Links between ranks are slow by the clock (`benchmarks.slow_links`); a table says what `mdi plan` would measure of them.
`decode` is without prompts; `requests` have three tokens of the prompt for each token of the answer, as plans assume.
A figure's ratio is to one node of one core, in the same turns; the prediction stands beside it, with the measured rate
as a part of the predicted one. Plans take machines that compute at the same time to be as slow as cores are then.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from benchmarks.figures import Figure, console, machine, ratio, report
from benchmarks.formats import FORMATS, Format, engine_settings, random_checkpoint
from benchmarks.machines import Speeds, pair
from benchmarks.sides import Side
from benchmarks.slow_links import Line
from mdi.checkpoint.source import open_source
from mdi.planning.choose import Goal, Job, Links, predict
from mdi.planning.hardware import LinkSpeed
from mdi.planning.predict import PROMPT_TOKENS

DTYPE = "bfloat16"
GIGABIT = 125e6
OWN = LinkSpeed(0.0, 0.0)  # of the machine itself
STREAMS = (1, 4)
TURNS = 3
TARGETS = {("7b", "int4", 0.2e-3): 1.4}
WORKS = {"decode": ("decode_rate", 0.0), "requests": ("throughput", PROMPT_TOKENS)}
"""The figure that counts, and the tokens of the prompt for each token of the answer."""
SEEDS = count()
SPLITS: dict[str, dict[str, Any]] = {
    "one": {},
    "layers": {"n_nodes": 2},
    "group": {"n_nodes": 2, "tensor_parallel_size": 2},
}


@dataclass(frozen=True)
class Setting:
    """What is compared on: cores, and a link between them, as it is set and as nodes measure it."""

    speeds: Speeds
    link: LinkSpeed
    measured: LinkSpeed

    @property
    def name(self) -> str:
        return f"{self.link.rtt_s * 1e3:g} ms, 1 Gb/s" if self.link.rtt_s else "this machine's link"

    @property
    def cells(self) -> tuple[str, ...]:
        """For a table of what was measured."""
        machines = (self.speeds.alone, self.speeds.together)
        rates = (f"{one.bytes_per_s / 1e9:.1f} GB/s, {one.flops_per_s / 1e12:.2f} Top/s" for one in machines)
        return self.name, f"{self.measured.rtt_s * 1e3:.3f} ms, {self.measured.bytes_per_s / 1e6:.0f} MB/s", *rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("checkpoints"), help="where random checkpoints are kept")
    parser.add_argument("--shape", default="2b", help="of the model")
    parser.add_argument("--format", choices=list(FORMATS), default="int4")
    parser.add_argument("--links", nargs="*", type=float, default=[], help="round trips between ranks, in ms")
    parser.add_argument("--answer", type=int, default=32, help="tokens of each answer")
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--json", type=Path, help="write the table there, too")
    options = parser.parse_args()
    path = random_checkpoint(options.folder, options.shape)
    title = f"{path.name}: plans on nodes of one core. {machine()}"
    with tempfile.NamedTemporaryFile(prefix="mdi-line-") as file:
        report(compared(path, FORMATS[options.format], Path(file.name), options), title, options.json)


def compared(path: Path, format_: Format, line_file: Path, options: argparse.Namespace) -> Iterator[Figure]:
    """Over the machine's own link all plans, over slow ones the group."""
    line = Line(line_file)
    settings = measured_settings(line, line_file, format_, options.links)
    more = {"dtype": DTYPE, "sequence_length": 4 * options.answer + 256, "max_sequences": max(STREAMS)}
    more |= {"encryption": True, **engine_settings(format_)}
    with ExitStack() as stack:
        sides = {
            split: stack.enter_context(
                Side(
                    "benchmarks.engine_side",
                    path=str(path),
                    settings=more | nodes,
                    cores=1 if split == "one" else None,
                    threads=1,
                    line=str(line_file) if split == "group" else None,
                )
            )
            for split, nodes in SPLITS.items()
        }
        for setting in settings:
            line.speed = setting.link
            here = sides if setting.link == OWN else {split: sides[split] for split in ("one", "group")}
            for streams in STREAMS:
                found = runs(here, streams, options.answer, options.turns)
                target = TARGETS.get((options.shape, format_.name, setting.link.rtt_s))
                yield from figures_of(format_.name, _job(path, format_, streams), setting, found, target)


def measured_settings(line: Line, line_file: Path, format_: Format, links_ms: list[float]) -> list[Setting]:
    """Measures the cores once, and each link; prints a table."""
    table, found = Table("link", "as nodes measure it", "a core", "a core beside a busy one"), list[Setting]()
    with pair(line_file) as nodes:
        speeds = nodes.speeds(format_, DTYPE)
        for link in [OWN, *(LinkSpeed(rtt_ms / 1e3, GIGABIT) for rtt_ms in links_ms)]:
            line.speed = link
            found.append(Setting(speeds, link, nodes.link()))
            table.add_row(*found[-1].cells)
    console.print(table)
    return found


def runs(sides: Mapping[str, Side], streams: int, answer: int, n_turns: int) -> dict[str, list[dict[str, float]]]:
    """What each side measures in each turn; a first one is not counted. Prompts differ, and are in no cache."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for turn in range(n_turns + 1):
        for name, side in sides.items():
            run = side.value(
                "measured",
                streams=streams,
                prompt_tokens=int(PROMPT_TOKENS * answer),
                answer_tokens=answer,
                seed=next(SEEDS),
            )
            found[name] += [run] * (turn > 0)
    return found


def figures_of(
    name: str, job: Job, setting: Setting, found: dict[str, list[dict[str, float]]], target: float | None
) -> Iterator[Figure]:
    """Of each plan, for answers alone and for whole requests. name: of the type. target: of a group's answers."""
    for work, (value, prompt_tokens) in WORKS.items():
        rates = {split: [run[value] for run in of_side] for split, of_side in found.items()}
        for split in found:
            promised = predicted(replace(job, prompt_tokens=prompt_tokens), split, setting)
            part = median(rates[split]) / promised
            yield Figure(
                name,
                f"{work}, streams: {job.streams}; {split}; {setting.name}",
                f"{median(rates[split]):.2f} tokens/s",
                f"{promised:.2f} predicted, {part:.2f} of it",
                ratio(rates[split], rates["one"]),
                target if (work, split) == ("decode", "group") else None,
            )


def predicted(job: Job, split: str, setting: Setting) -> float:
    """Tokens a second that the plan promises."""
    takes_turns = split == "one" or (split == "layers" and job.streams == 1)
    machines = [setting.speeds.alone if takes_turns else setting.speeds.together] * (1 if split == "one" else 2)
    plan = job.plan(machines, (2,) if split == "group" else (1,) * len(machines))
    return 1 / predict(job, plan, machines, Links({(0, 1): setting.measured})).token_s


def _job(path: Path, format_: Format, streams: int) -> Job:
    config = open_source(path).model_config
    optimize: Goal = "latency" if streams == 1 else "throughput"
    return Job(config, DTYPE, format_.quantization, optimize, streams=streams)


if __name__ == "__main__":
    main()
