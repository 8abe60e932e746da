"""Tables of `mdi bench`."""

from __future__ import annotations

from rich.console import Console

from mdi.bench.measure import MemoryLog, Run
from mdi.bench.report import Bench, NodeMemory
from mdi.bench.scenario import Scenario
from mdi.core.tracing import Span, SpanName
from tests.bench.runs import RUN


def test_tables_fit_into_80_columns() -> None:
    memory = NodeMemory("secondary0", 467 * 10**6, 10**9, 3 * 10**9, 467 * 10**6, 10**9, 5 * 10**9)
    bench = Bench("Qwen2-VL-2B-Instruct", "bfloat16", "avx2, 2 threads", (RUN,), (RUN,), (memory,), MemoryLog(0.0))
    shown = rendered(bench)
    for figure in ("7.0", "1.100 s", "350.0 ms", "200.00", "1.00x", "preprocess", "secondary0"):
        assert figure in shown


def test_tables_of_long_runs_do_as_well() -> None:
    names = ("starter", "secondary0", "secondary1", "finisher")
    works: tuple[SpanName, ...] = ("fetch", "preprocess", "encode", "prefill", "decode", "sample")
    nodes = {name: [Span(work, 0.0, 1234.5) for work in works] for name in names}
    times_s = tuple(tuple(1000.0 + stream + token / 7 for token in range(9)) for stream in range(128))
    run = Run(Scenario(128, 32_768, 1024, 9), 34_128, times_s, nodes)
    memory = NodeMemory("secondary0", *[145_412 * 10**6] * 6)
    bench = Bench("Qwen2-VL-72B-Instruct", "bfloat16", "avx512-vnni", (run,), (run,), (memory,), MemoryLog(0.0))
    shown = rendered(bench)
    for figure in ("1234.5", "128 x", "32768", "1024²", "145,412", "secondary1", "preprocess", "1.00x"):
        assert figure in shown


def rendered(bench: Bench) -> str:
    """What a terminal of 80 columns shows."""
    console = Console(width=80, record=True)
    for table in bench.tables():
        console.print(table)
    shown = console.export_text()
    assert "…" not in shown  # nothing is cut off
    assert max(map(len, shown.splitlines())) <= 80
    return shown
