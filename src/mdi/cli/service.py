"""`mdi service`: a command as a service of systemd, which starts with the machine and comes back by itself."""

from __future__ import annotations

import os
import pwd
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from mdi.cli.gateway_options import GatewayOptions
from mdi.cli.screen import say
from mdi.cli.secondary import NodeOptions
from mdi.cli.systemd import Unit
from mdi.core.errors import ConfigError

SYSTEM_UNITS, SYSTEM_SETTINGS = Path("/etc/systemd/system"), Path("/etc/mdi")
PATHS_OR_NAMES = ("model", "ckpt", "chat_template", "generation_config")  # a path if there is something
LEAVE_S = 30.0  # that a node may take to hand over to a spare


def service(
    command: Annotated[
        list[str],
        typer.Argument(
            metavar="COMMAND...",
            help="`serve` or `secondary` with all its options, as they are typed without `service`.",
        ),
    ],
    user: Annotated[
        bool,
        typer.Option("--user", help="For your own systemd, without root; see `loginctl enable-linger`."),
    ] = False,
    run_as: Annotated[
        str | None, typer.Option(help="User that the service runs as; you, if not given, also behind sudo.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the unit; mdi-server or mdi-NODE, if not given.")] = None,
    to: Annotated[Path | None, typer.Option(help="Folder for the unit, in place of systemd's own.")] = None,
    only_print: Annotated[
        bool, typer.Option("--print", help="Write the unit to standard output, and no file.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a unit of that name.")] = False,
) -> None:
    """Write a systemd unit that runs `mdi serve ...` or `mdi secondary ...` from now on. Checks that command first."""
    if user and run_as:
        raise ConfigError("a service of your own systemd (--user) runs as you: leave --run-as out")
    task = _task(command)
    name = name or task.name
    if not name.replace("-", "").replace("_", "").isalnum() or not name.isascii():
        raise ConfigError(f"{name!r} is no name of a unit: take letters, digits, - and _")
    settings = _user_folder("mdi") if user else SYSTEM_SETTINGS
    unit = Unit(
        task.description,
        [sys.executable, "-m", "mdi", *task.words],
        user=None if user else _user(run_as),
        environment=["ENABLE_ENCRYPTION=1"] if _encrypted() else [],
        environment_file=settings / f"{name}.env",
        writable=task.writable,
        stop_s=task.stop_s,
        low_port=task.low_port,
        ray=task.ray,
    )
    if only_print:
        print(unit.text(), end="")  # noqa: T201
        return
    file = (to or (_user_folder("systemd/user") if user else SYSTEM_UNITS)) / f"{name}.service"
    _write(file, unit.text(), force)
    say(f"wrote {file}\n{_next_steps(name, unit, user, installed=to is None)}")


@dataclass(frozen=True)
class _Task:
    """What a unit is to run. words: of the command, with absolute paths."""

    name: str
    description: str
    words: list[str]
    writable: list[Path]
    stop_s: float
    low_port: bool
    ray: bool = False


def _task(words: list[str]) -> _Task:
    """Parses a command as it would be parsed when it starts, and checks what can be checked before it does.

    Raises ConfigError, or a usage error of the command line, for a command that would not start.
    """
    from mdi.cli.app import app

    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    kind, *rest = words
    if kind not in ("serve", "secondary"):
        raise ConfigError(f"a service runs `mdi serve ...` or `mdi secondary ...`, not {kind!r}")
    context = commands[kind].make_context(f"mdi {kind}", rest)
    absolute = [kind, *_absolute(context)]
    return (_server if kind == "serve" else _node)(context.params, absolute)


def _server(given: Mapping[str, Any], words: list[str]) -> _Task:
    from mdi.cluster.launchers.manual import starter_identity
    from mdi.cluster.nodes_config import NodesConfig
    from mdi.core.config import ManualNodes
    from mdi.gateway.server import check_files

    model = given["model"] or given["ckpt"]
    if not model or (given["model"] and given["ckpt"]):
        raise ConfigError("name one checkpoint: mdi service serve CHECKPOINT")
    if nodes_config := given["nodes_config"]:
        manual = ManualNodes(nodes_config, certs=given["certs"], insecure=given["insecure"])
        starter_identity(NodesConfig.read(nodes_config), manual, _encrypted())
    check_files(GatewayOptions(**{item.name: given[item.name] for item in fields(GatewayOptions)}).config())
    folders = [Path(model), given["ckpt_folder"], *filter(None, [given["adapter"]])]
    return _Task(
        "mdi-server",
        f"MDI-LLM server of {model}",
        words,
        [folder.absolute() for folder in folders if folder.is_dir()],
        given["drain_timeout"],
        0 < given["port"] < 1024,
        given["ray"] is not None,
    )


def _node(given: Mapping[str, Any], words: list[str]) -> _Task:
    from mdi.rpc.channel import is_loopback
    from mdi.rpc.tls import VARIABLE

    options = NodeOptions(**given)
    settings = options.settings()
    host, _, port = settings.listen.rpartition(":")
    if settings.identity is None and not settings.insecure and not is_loopback(host):
        raise ConfigError(
            f"links are not encrypted, so only loopback may be bound, not {host}: set {VARIABLE}=1 (see `mdi certs "
            "--help`; behind sudo: sudo ENABLE_ENCRYPTION=1 mdi service ...), or allow it with --insecure"
        )
    writable = list[Path]()
    if given["cache_folder"] and settings.cache:
        settings.cache.check()
        writable = [settings.cache.folder.absolute()]
    node = options.place.name
    return _Task(f"mdi-{node}", f"MDI-LLM node {node}", words, writable, LEAVE_S, 0 < int(port) < 1024)


def _absolute(context: Any) -> Iterator[str]:
    """The words of a parsed command again, with absolute paths.

    Paths that an option has by default, or from a file of options, are relative to this folder: they are written down,
    if they lead anywhere. Raises ConfigError for a secret, which everybody could read in a unit.
    """
    for item in sorted(context.command.params, key=lambda item: item.param_type_name):  # arguments first
        value, source = context.params.get(item.name), context.get_parameter_source(item.name)
        typed = source is not None and source.name == "COMMANDLINE"
        if typed and getattr(item, "envvar", None):
            raise ConfigError(
                f"everybody could read {item.opts[0]} in the unit: write {item.envvar}=... into the service's "
                "environment file in its place"
            )
        if isinstance(value, Path) or (value and item.name in PATHS_OR_NAMES):
            there = Path(value).exists()
            if typed or there:
                yield from _typed(item, Path(value).absolute() if there or isinstance(value, Path) else value)
        elif typed and value is not None:
            yield from _typed(item, value)


def _typed(item: Any, value: Any) -> Iterator[str]:
    """A parameter as it is typed."""
    if item.param_type_name == "argument":
        yield str(value)
        return
    option = next(name for name in item.opts if name.startswith("--"))
    if item.is_flag:
        yield option
    else:
        for each in value if item.multiple else [value]:
            yield from (option, str(each))


def _encrypted() -> bool:
    from mdi.rpc.tls import encryption_enabled

    return encryption_enabled()


def _user(given: str | None) -> str:
    """The user that a service of the system runs as. Raises ConfigError for one that is not there."""
    name = given or os.environ.get("SUDO_USER") or pwd.getpwuid(os.getuid()).pw_name
    try:
        return pwd.getpwnam(name).pw_name
    except KeyError:
        raise ConfigError(f"there is no user {name!r} on this machine: name one with --run-as") from None


def _user_folder(below: str) -> Path:
    """A folder below the user's folder of settings."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / below


def _write(file: Path, text: str, force: bool) -> None:
    """Writes a unit, all of it or nothing. Raises ConfigError when another one is there, without `force`."""
    try:
        if file.exists() and file.read_text() != text and not force:
            raise ConfigError(f"{str(file)!r} is there already, and differs: --force replaces it, --name takes another")
        file.parent.mkdir(parents=True, exist_ok=True)
        half = file.with_name(f".{file.name}.{os.getpid()}")
        half.write_text(text)
        half.replace(file)
    except OSError as error:
        raise ConfigError(
            f"{str(file)!r} cannot be written ({error.strerror}): run this with sudo, or take --user, --to or --print"
        ) from None


def _next_steps(name: str, unit: Unit, user: bool, *, installed: bool) -> str:
    control = "systemctl --user" if user else "sudo systemctl"
    lines = [
        f"Secrets (MDI_API_KEY=..., HF_TOKEN=...) go into {unit.environment_file}, a line each; chmod 600 it.",
        *([] if installed else ["Copy the unit to where systemd looks for units, then:"]),
        f"{control} daemon-reload && {control} enable --now {name}",
        *(["sudo loginctl enable-linger $USER    # it starts with the machine, not with you"] if user else []),
        f"journalctl {'--user ' * user}-u {name} -f",
    ]
    return "\n".join(lines)
