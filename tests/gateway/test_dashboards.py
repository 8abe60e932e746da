"""Dashboards find what they ask for in the series of a server with two nodes: docs/grafana.json, and vLLM's own."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample
from testing.waiting import wait_for

from mdi import Engine
from tests.gateway.conftest import CHAT, LONG_WAIT_S, serving

DOCS = Path(__file__).parents[2] / "docs"
NAME = re.compile(r"(?:vllm|mdi):\w+")
GROUPED = re.compile(r"by\s*\(([^)]*)\)")
SHOWN = re.compile(r"{{(\w+)}}")

# What the queries of examples/observability/prometheus_grafana/grafana.json name in vLLM's repository, as of its commit
# 4b5c627c23e6690b8987100d1cbf78e34ac14bf9, with the labels beside model_name.
VLLM: dict[str, set[str]] = {
    "vllm:e2e_request_latency_seconds_bucket": {"le"},
    "vllm:e2e_request_latency_seconds_count": set(),
    "vllm:e2e_request_latency_seconds_sum": set(),
    "vllm:generation_tokens_total": set(),
    "vllm:inter_token_latency_seconds_bucket": {"le"},
    "vllm:inter_token_latency_seconds_count": set(),
    "vllm:inter_token_latency_seconds_sum": set(),
    "vllm:kv_cache_usage_perc": set(),
    "vllm:num_requests_running": set(),
    "vllm:num_requests_waiting": set(),
    "vllm:prompt_tokens_total": set(),
    "vllm:request_decode_time_seconds_sum": set(),
    "vllm:request_generation_tokens_bucket": {"le"},
    "vllm:request_max_num_generation_tokens_sum": set(),
    "vllm:request_prefill_time_seconds_sum": set(),
    "vllm:request_prompt_tokens_bucket": {"le"},
    "vllm:request_queue_time_seconds_sum": set(),
    "vllm:request_success_total": {"finished_reason"},
    "vllm:time_to_first_token_seconds_bucket": {"le"},
    "vllm:time_to_first_token_seconds_count": set(),
    "vllm:time_to_first_token_seconds_sum": set(),
}

Exported = dict[str, set[str]]
"""Labels by the name of a sample."""


@pytest.fixture(scope="module")
def samples(tiny_checkpoint: Path) -> Iterator[list[Sample]]:
    """What a server has when its nodes have reported a request."""
    with Engine(tiny_checkpoint, n_nodes=2, sequence_length=512, max_sequences=2) as engine, serving(engine) as server:
        chat = {**CHAT, "model": engine.model_name, "max_tokens": 4}
        assert server.post("/v1/chat/completions", json=chat).status_code == 200
        wait_for(lambda: len({node.steps for node in engine.nodes()}) == 1, LONG_WAIT_S)
        families = text_string_to_metric_families(server.get("/metrics").text)
        yield [sample for family in families for sample in family.samples]


@pytest.fixture(scope="module")
def exported(samples: list[Sample]) -> Exported:
    return {sample.name: set(sample.labels) for sample in samples}


def queries() -> list[tuple[str, str]]:
    """Each query of our dashboard, and the legend of its lines."""
    panels: list[dict[str, Any]] = json.loads((DOCS / "grafana.json").read_text())["panels"]
    return [(target["expr"], target["legendFormat"]) for panel in panels for target in panel.get("targets", ())]


def test_vllm_s_dashboard_finds_its_series(exported: Exported) -> None:
    for name, labels in VLLM.items():
        assert {"model_name", *labels} <= exported[name], name


def test_our_dashboard_finds_its_series(exported: Exported) -> None:
    for query, legend in queries():
        names = NAME.findall(query)
        wanted = {label.strip() for labels in GROUPED.findall(query) for label in labels.split(",")}
        assert names, query
        for name in names:
            assert {"model_name", "engine", *wanted} <= exported[name], (name, query)
        assert {*SHOWN.findall(legend)} <= wanted, (query, legend)


def test_our_dashboard_shows_every_series_but_the_layout_of_the_cache(exported: Exported) -> None:
    shown = {_family(name) for query, _ in queries() for name in NAME.findall(query)}
    assert {_family(name) for name in exported} - shown == {"vllm:cache_config_info"}


def test_its_panels_stand_side_by_side() -> None:
    panels = json.loads((DOCS / "grafana.json").read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [cell for panel in panels for cell in _cells(panel["gridPos"])]
    assert len(set(cells)) == len(cells)
    assert all(x < 24 for x, _ in cells)


def test_the_scrape_config_asks_this_path() -> None:
    [job] = yaml.safe_load((DOCS / "prometheus.yml").read_text())["scrape_configs"]
    assert job.get("metrics_path", "/metrics") == "/metrics"
    assert job["static_configs"] == [{"targets": ["127.0.0.1:8000"]}]


def test_nodes_and_links_of_a_real_pipeline_have_moved(samples: list[Sample]) -> None:
    [batches] = [sample.value for sample in samples if sample.name == "vllm:iteration_tokens_total_count"]
    steps = {sample.labels["node"]: sample.value for sample in samples if sample.name == "mdi:node_step_seconds_count"}
    times = {sample.labels["node"]: sample.value for sample in samples if sample.name == "mdi:node_step_seconds_sum"}
    assert steps == {"starter": batches, "finisher": batches}
    assert min(times.values()) > 0
    links = {
        (sample.labels["from"], sample.labels["to"]): sample.value
        for sample in samples
        if sample.name == "mdi:link_bytes_total"
    }
    assert links.keys() == {("starter", "finisher"), ("finisher", "starter")}
    assert links["starter", "finisher"] > links["finisher", "starter"] > 0


def _family(name: str) -> str:
    return re.sub(r"_(bucket|sum|count)$", "", name)


def _cells(place: dict[str, int]) -> Iterator[tuple[int, int]]:
    for x in range(place["x"], place["x"] + place["w"]):
        for y in range(place["y"], place["y"] + place["h"]):
            yield x, y
