"""The command line: its commands, a file each, and the exit codes of errors.

Exit codes: 0 done, 2 for what the caller can mend (input, options, checkpoints), 1 for everything else.
"""

from __future__ import annotations

import sys

import typer

from mdi.cli import cache, certs
from mdi.cli.ask import ask
from mdi.cli.bench import bench
from mdi.cli.chat import chat
from mdi.cli.cluster import cluster
from mdi.cli.config_file import CommandLikeVllms
from mdi.cli.demo import demo
from mdi.cli.models import models
from mdi.cli.plan import plan
from mdi.cli.prepare import prepare
from mdi.cli.screen import say_error
from mdi.cli.secondary import secondary
from mdi.cli.serve import serve
from mdi.cli.service import service
from mdi.cli.verify import verify
from mdi.core.allocator import limit_arenas
from mdi.core.errors import CheckpointError, ConfigError, InputError, MDIError

app = typer.Typer(
    name="mdi",
    help="One vision-language model over the machines you already have.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command(cls=CommandLikeVllms)(serve)
app.command(context_settings={"allow_interspersed_args": False})(service)
for command in (prepare, plan, secondary, ask, chat, cluster, verify, bench, demo, models):
    app.command()(command)
app.add_typer(certs.app, name="certs")
app.add_typer(cache.app, name="cache")


def main() -> None:
    """Entry point of `mdi` and `python -m mdi`."""
    limit_arenas()
    try:
        app()
    except MDIError as error:
        say_error(str(error))
        sys.exit(2 if isinstance(error, (InputError, ConfigError, CheckpointError)) else 1)
