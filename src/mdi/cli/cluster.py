"""`mdi cluster`: the machines of a running server, live."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from mdi.cli.screen import out, say
from mdi.core.errors import ConfigError
from mdi.core.group import Rank
from mdi.core.tables import UncutTable

if TYPE_CHECKING:
    import httpx

URL = "http://127.0.0.1:8000"
EVERY_S, TIMEOUT_S = 1.0, 5.0
STATE_STYLES = {"ready": "green", "lost": "bold red", "failed": "bold red"}  # yellow: on its way

FIELDS = {"model", "nodes", "plan", "requests", "cache", "recoveries", "failed_requests", "recovering"}  # that we show

Node = Mapping[str, Any]


@dataclass(frozen=True)
class Snapshot:
    """What a server said at a time. report: as /v1/nodes answers; asked_s: on the monotonic clock."""

    report: Mapping[str, Any]
    asked_s: float


def cluster(
    url: Annotated[str, typer.Option(help="The server.")] = URL,
    api_key: Annotated[str | None, typer.Option(envvar="MDI_API_KEY", help="A key of the server.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what the server says once, as JSON.")] = False,
) -> None:
    """Show a running server's machines, once a second; without a terminal, once."""
    import httpx

    keys = (api_key or "").split()  # the variable may hold several
    headers = {b"Authorization": f"Bearer {keys[0]}".encode()} if keys else {}
    with httpx.Client(base_url=_checked(url), headers=headers, timeout=TIMEOUT_S) as client:
        first = _fetch(client)
        if as_json:
            say(json.dumps(first.report, indent=2))
        elif out.is_terminal:
            _watch(lambda: _fetch(client), first)
        else:
            out.print(_shown(first, first))


def _checked(url: str) -> httpx.URL:
    import httpx

    try:
        checked = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ConfigError(f"--url is like {URL}, got {url!r}: {error}") from None
    if checked.scheme not in ("http", "https") or not checked.host:
        raise ConfigError(f"--url is like {URL}, got {url!r}")
    return checked


def _fetch(client: httpx.Client) -> Snapshot:
    """Raises ConfigError where no server of ours answers, or refuses the key."""
    report = _get(client, "/v1/nodes")
    if not isinstance(report, dict) or not report.keys() >= FIELDS:
        raise ConfigError(f"what answers at {client.base_url} is no server of this mdi's version: name it with --url")
    return Snapshot(report, time.monotonic())


def _get(client: httpx.Client, path: str) -> Any:
    import httpx

    try:
        answer = client.get(path)
        if answer.status_code == httpx.codes.UNAUTHORIZED:
            raise ConfigError(f"{client.base_url} needs an API key: --api-key KEY, or MDI_API_KEY")
        return answer.raise_for_status().json()
    except httpx.TransportError as error:
        raise ConfigError(f"nothing answers at {client.base_url} ({error}): does mdi serve run there?") from None
    except (httpx.HTTPStatusError, ValueError):
        raise ConfigError(f"what answers at {client.base_url} is no server of mdi serve: name it with --url") from None


def _watch(fetch: Callable[[], Snapshot], first: Snapshot) -> None:
    """Until Ctrl-C. A server that does not answer may come back: what was seen last stays, with the reason."""
    before = now = first
    with Live(_shown(now, before), console=out, auto_refresh=False) as live:
        try:
            while True:
                time.sleep(EVERY_S)
                try:
                    before, now = now, fetch()
                    live.update(_shown(now, before), refresh=True)
                except ConfigError as error:
                    since = Text(f"{error} (seen last {time.monotonic() - now.asked_s:.0f} s ago)", "bold red")
                    live.update(Group(_shown(now, now), since), refresh=True)
        except KeyboardInterrupt:
            return


def _shown(now: Snapshot, before: Snapshot) -> RenderableType:
    """before: seen earlier, for the rates of links."""
    table = UncutTable("node", "state", "layers", "memory", "busy", "links", "round trip", "computes with", narrow=True)
    traffic = {_key(node): _traffic(node) for node in before.report["nodes"]}
    seconds = now.asked_s - before.asked_s
    for node in now.report["nodes"]:
        rate = (_traffic(node) - traffic.get(_key(node), 0)) / seconds if seconds and _key(node) in traffic else None
        table.add_row(
            node["name"] + (f" {node['replica']}" if "replica" in node else ""),
            Text(node["state"], STATE_STYLES.get(node["state"], "yellow")),
            _layers(node),
            f"{node['resident_bytes'] / 1e6:,.0f} MB",
            f"{node['busy_share']:.0%}",
            "" if rate is None else f"{max(0.0, rate) / 1e6:.2f} MB/s",
            "" if node["round_trip_s"] is None else f"{node['round_trip_s'] * 1e3:.1f} ms",
            f"{node['device']} {node['kernels']}".strip(),
        )
    causes = [Text(f"{node['name']}: {node['error']}", "red") for node in now.report["nodes"] if node["error"]]
    return Group(table, *causes, Text(_summary(now, before)), Text(f"The plan: {now.report['plan']['reason']}.", "dim"))


def _summary(now: Snapshot, before: Snapshot) -> str:
    report, requests = now.report, now.report["requests"]
    parts = [f"{report['model']}: {requests['running']} requests running, {requests['waiting']} waiting"]
    if seconds := now.asked_s - before.asked_s:
        tokens = requests["generated_tokens"] - before.report["requests"]["generated_tokens"]
        parts.append(f"{max(0, tokens) / seconds:.1f} tokens/s")
    parts.append(f"KV cache {report['cache']['used_share']:.0%} full")
    if recoveries := report["recoveries"]:
        parts.append(f"nodes lost and brought back: {recoveries}")
    if failed := report["failed_requests"]:
        parts.append(f"requests that ended with them: {failed}")
    if report["recovering"]:
        parts.append("a lost node is being brought back: requests wait")
    return "; ".join(parts)


def _layers(node: Node) -> str:
    if node["last_layer"]:
        layers, shards = f"{node['first_layer']}-{node['last_layer'] - 1}", node.get("shards")
        return f"{Rank(**shards).share:.0%} of {layers}" if shards else layers
    return "images" if node["dtype"] else "spare"


def _key(node: Node) -> Sequence[Any]:
    """Of one process: another one counts from nothing."""
    return node.get("replica"), node["name"], node["pid"]


def _traffic(node: Node) -> int:
    return int(node["sent_bytes"]) + int(node["received_bytes"])
