"""Tables of `mdi bench`."""

from __future__ import annotations

from rich.console import Console

from mdi.bench.measure import MemoryLog
from mdi.bench.report import Bench, NodeMemory
from tests.bench.runs import RUN


def test_tables_of_three_nodes_fit_into_80_columns() -> None:
    memory = NodeMemory("secondary0", 467 * 10**6, 10**9, 3 * 10**9, 467 * 10**6, 10**9, 5 * 10**9)
    bench = Bench("Qwen2-VL-2B-Instruct", "bfloat16", "avx2, 2 threads", (RUN,), (RUN,), (memory,), MemoryLog(0.0))
    console = Console(width=80, record=True)
    for table in bench.tables():
        console.print(table)
    shown = console.export_text()
    assert "…" not in shown  # nothing is cut off
    for figure in ("7.0", "1.100 s", "350.0 ms", "200.00", "1.00x", "preprocess", "secondary0"):
        assert figure in shown
