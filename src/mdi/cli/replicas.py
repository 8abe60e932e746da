"""Several whole pipelines as one application of Ray Serve, which routes, checks, scales and replaces them.

Each replica is a starter in a process of Ray, with nodes of its own on the cluster, and answers with the application of
a single server.
"""

from __future__ import annotations

import logging
import secrets
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mdi.cli.logs import LogFormat, set_up_logs
from mdi.cli.screen import err, say
from mdi.cluster.launchers.manual import Presence
from mdi.cluster.launchers.ray_cluster import AUTO, RayCluster
from mdi.core.config import EngineConfig, GatewayConfig
from mdi.core.errors import ConfigError, LinkError
from mdi.gateway.app import create_app
from mdi.gateway.metrics import Metrics
from mdi.gateway.metrics import joined as joined_metrics
from mdi.gateway.nodes import Report, joined, report
from mdi.gateway.request_record import REQUEST_ID
from mdi.gateway.server import KEEP_ALIVE_S

DEPLOYMENT = "pipeline"
POLL_S = 1.0
HEALTH_PERIOD_S = 5.0
ANSWER_S = 5.0  # of replicas, to questions of ours
MOST_ONGOING = 100_000  # requests of a replica in Serve's count: its own queue has the limit, and answers 429 beyond it
ROUTER = "ray.serve.experimental.consistent_hash_router:ConsistentHashRouter"  # a session stays with its replica


@dataclass(frozen=True)
class ReplicaCount:
    """How many replicas there are: from `least` to `most`, as running requests ask for."""

    least: int
    most: int

    @classmethod
    def parse(cls, text: str) -> ReplicaCount:
        """`2`, or `1:4`. Raises ConfigError for anything else."""
        least, _, most = text.partition(":")
        try:
            count = cls(int(least), int(most or least))
        except ValueError:
            count = cls(0, 0)
        if not 1 <= count.least <= count.most:
            raise ConfigError(f"--replicas is a number, or the least and the most with a colon: 2, 1:4; got {text!r}")
        return count


class Replica:
    """One replica, as Ray Serve runs it: it is made in the replica's process, and its methods are called there."""

    def __init__(self, application: Application) -> None:
        from mdi.engine import Engine

        set_up_logs(application.log_format, access=application.access_log)
        self._engine = Engine(application.config.with_settings(ray=AUTO), waiting=_log_waiting)
        self._application = application

    def __serve_build_asgi_app__(self) -> ASGIApp:
        app = create_app(self._engine, self._application.gateway, _AllReplicas())
        self._metrics: Metrics = app.state.metrics
        return OwnHeaders(app)

    def command(self) -> str:
        """The id of the command that deployed this replica."""
        return self._application.command

    def check_health(self) -> None:
        """Serve replaces a replica that raises: its nodes are lost for good."""
        if self._engine.error:
            raise self._engine.error

    def report(self) -> Report:
        """What /v1/nodes answers, of this replica alone."""
        return report(self._engine, self._metrics, _AllReplicas().name)

    def metrics(self) -> str:
        """This replica's series, under its name."""
        return self._metrics.text()

    def __del__(self) -> None:
        if engine := getattr(self, "_engine", None):
            engine.close()


def _log_waiting(nodes: Sequence[Presence]) -> None:
    """Writes into the replica's log what its nodes wait for."""
    for node in nodes:
        logging.getLogger("ray.serve").info("%s: %s", node.node.role, node.note)


class _AllReplicas:
    """All replicas, seen from one of them."""

    @property
    def name(self) -> str:
        from ray import serve

        return str(serve.get_replica_context().replica_id.unique_id)

    async def nodes(self) -> Report:
        return joined([report for report in await self._ask("report") if isinstance(report, dict)])

    async def metrics(self) -> str:
        return joined_metrics([text for text in await self._ask("metrics") if isinstance(text, str)])

    async def _ask(self, method: str) -> list[Any]:
        """What each answers, or the error of those that do not."""
        from ray import serve

        context = serve.get_replica_context()
        handle = serve.get_deployment_handle(context.deployment, context.app_name)
        answers: list[Any] = await handle.broadcast(method).results_async(timeout_s=ANSWER_S, return_exceptions=True)
        return answers


class OwnHeaders:
    """ASGI middleware that drops the header that Serve's own server adds as well."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                del MutableHeaders(scope=message)[REQUEST_ID]
            await send(message)

        await self._app(scope, receive, sent)


@dataclass(frozen=True)
class Application:
    """What `serve_replicas` runs. name: a later one of the same name replaces it. command: an id of its own."""

    config: EngineConfig
    gateway: GatewayConfig
    count: ReplicaCount
    log_format: LogFormat
    access_log: bool
    command: str = field(default_factory=lambda: secrets.token_hex(8))

    @property
    def name(self) -> str:
        names = self.gateway.served_model_name
        return names[0] if names else self.config.model.checkpoint

    def deployment(self) -> Any:
        """The application of Ray Serve."""
        from ray import serve
        from ray.serve.config import RequestRouterConfig

        amounts = dict(self.config.cluster.on_ray.ray_resources or {"CPU": 1})
        scaling: dict[str, Any] = {"num_replicas": self.count.least}
        if self.count.most > self.count.least:
            limits = {"min_replicas": self.count.least, "max_replicas": self.count.most}
            scaling = {"autoscaling_config": {**limits, "target_ongoing_requests": self.config.cache.max_sequences}}
        deployment = serve.deployment(
            name=DEPLOYMENT,
            ray_actor_options={
                "num_cpus": amounts.pop("CPU", 0),
                "num_gpus": amounts.pop("GPU", 0),
                "memory": amounts.pop("memory", None),
                "resources": amounts,
            },
            max_ongoing_requests=MOST_ONGOING,
            request_router_config=RequestRouterConfig(request_router_class=ROUTER),
            health_check_period_s=HEALTH_PERIOD_S,
            graceful_shutdown_timeout_s=self.gateway.drain_timeout_s,
            **scaling,
        )
        return deployment(serve.ingress()(Replica)).bind(self)


def serve_replicas(application: Application, port: int) -> None:
    """Runs the application until SIGINT or SIGTERM, and ends it then; a later one of its name takes its place.

    Raises ConfigError where it cannot be, and LinkError when its replicas do not start.
    """
    if application.config.cluster.on_ray.ray is None:
        raise ConfigError("--replicas are for a Ray cluster: name it with --ray")
    if port == 0:
        raise ConfigError("--replicas share one port, which Ray Serve does not choose: name it with --port")
    cluster = RayCluster.connect(application.config.cluster.on_ray.ray)
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    try:
        _open_door(application.gateway, port)
        try:
            _run(application, port, stopped)
        finally:
            _close_door_if_idle()
    finally:
        cluster.close()


def _open_door(gateway: GatewayConfig, port: int) -> None:
    """Starts Ray Serve with its HTTP server on the head. Raises ConfigError where it runs with another already."""
    serve = _imported()
    files = {"ssl_certfile": gateway.ssl_certfile, "ssl_keyfile": gateway.ssl_keyfile}
    files |= {"ssl_ca_certs": gateway.ssl_ca_certs}
    wanted: dict[str, Any] = {name: str(file) for name, file in files.items() if file}
    if gateway.ssl_keyfile_password:
        wanted["ssl_keyfile_password"] = gateway.ssl_keyfile_password
    wanted |= {"host": gateway.host, "port": port, "keep_alive_timeout_s": KEEP_ALIVE_S}
    serve.start(proxy_location="HeadOnly", http_options=wanted)
    there = serve.context._get_global_client().http_config  # Serve itself only logs that it ignores ours
    other = [f"{name} {getattr(there, name)}" for name, value in wanted.items() if getattr(there, name) != value]
    if other:
        raise ConfigError(
            f"Ray Serve runs on this cluster already, with {', '.join(other)}: use the same, or end what it runs "
            "(serve shutdown)"
        )


def _close_door_if_idle() -> None:
    """Ends Ray Serve, unless it has applications of others, or one that another command took over."""
    serve = _imported()
    if not serve.status().applications:
        serve.shutdown()


def _run(application: Application, port: int, stopped: threading.Event) -> None:
    serve = _imported()
    target = serve.RunTarget(application.deployment(), application.name, application.gateway.root_path or "/")
    try:
        running = _Running(application, serve.run_many([target], wait_for_applications_running=False)[0])
    except RuntimeError as error:  # of Serve
        raise LinkError(f"Ray Serve does not take the replicas: {' '.join(str(error).split())[:400]}") from None
    try:
        running.wait_until_all_run(stopped)
        if not stopped.is_set():
            scheme = "https" if application.gateway.ssl_certfile else "http"
            print(f"serving {application.name} at {scheme}://{application.gateway.host}:{port}", flush=True)  # noqa: T201
        while not stopped.wait(POLL_S):
            if running.taken_over():
                say(f"another command took over {application.name}: this one ends, and leaves the replicas to it", err)
                break
            running.status()
    finally:
        running.end()


class _Running:
    """The application as Ray Serve runs it."""

    def __init__(self, application: Application, handle: Any) -> None:
        self._name = application.name
        self._command = application.command
        self._handle = handle

    def wait_until_all_run(self, stopped: threading.Event) -> None:
        """Shows what the replicas do until all run, or it is `stopped`. Raises LinkError when they fail."""
        shown = ""
        while not stopped.wait(POLL_S):
            now = self.status()
            pipeline = now.deployments.get(DEPLOYMENT)
            if now.status in ("DEPLOY_FAILED", "UNHEALTHY"):
                raise LinkError(f"the replicas do not start: {_reason(pipeline.message if pipeline else now.message)}")
            if now.status == "RUNNING" and self._commands() == {self._command}:
                return
            states = (
                ", ".join(f"{n} {state.lower()}" for state, n in pipeline.replica_states.items()) if pipeline else ""
            )
            if states and states != shown:
                say(f"replicas: {states}", err)
                shown = states

    def status(self) -> Any:
        """Raises LinkError when the application was ended."""
        if now := _imported().status().applications.get(self._name):
            return now
        raise LinkError(f"{self._name} was ended by another command")

    def taken_over(self) -> bool:
        """Whether a replica is there that another command has deployed."""
        return bool(self._commands() - {self._command})

    def end(self) -> None:
        """Ends the application, unless it was taken over."""
        serve = _imported()
        if self._name in serve.status().applications and not self.taken_over():
            serve.delete(self._name)

    def _commands(self) -> set[str]:
        answers = self._handle.broadcast("command").results(timeout_s=ANSWER_S, return_exceptions=True)
        return {answer for answer in answers if isinstance(answer, str)}


def _reason(message: str) -> str:
    """The last line of a replica's traceback: the error itself."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("mdi.", "ray."))]
    return (errors or lines or ["Ray Serve's log says why (ray logs)"])[-1][:600]


def _imported() -> Any:
    """Ray Serve. Raises ConfigError when it is not installed."""
    try:
        from ray import serve
    except ImportError:
        raise ConfigError("Ray Serve is not installed here: pip install 'mdi-llm[cluster]', on every machine") from None
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    return serve
