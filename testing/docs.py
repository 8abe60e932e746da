"""Writes docs/commands.md from the command line itself: `make docs`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from mdi.cli.app import app

PAGE = Path(__file__).parents[1] / "docs" / "commands.md"
HEAD = """# Commands

Every command with its arguments and options, as `mdi COMMAND --help` shows them. Written by `make docs`: do not edit.

A command ends with 0 when it is done, with 2 for what the caller can mend (input, options, checkpoints), or with 1.

`mdi --install-completion` lets your shell (bash, zsh, fish, PowerShell) complete commands, options, checkpoints and the
values of options from its next start on; `mdi --show-completion` prints what it installs. In zsh, the first Tab of a
shell only loads the completion.
"""


def commands_page() -> str:
    """The page as it should be."""
    return HEAD + "".join(_sections(typer.main.get_command(app), "mdi"))


def _sections(command: Any, name: str) -> Iterator[str]:
    if hasattr(command, "commands"):
        for part, below in sorted(command.commands.items()):
            yield from _sections(below, f"{name} {part}")
        return
    arguments = [item for item in command.params if item.param_type_name == "argument"]
    options = [
        item for item in command.params if item.param_type_name == "option" and item.name != "help" and not item.hidden
    ]
    usage = [item.name.upper() if item.required else f"[{item.name.upper()}]" for item in arguments]
    yield f"\n## {' '.join([name, *usage])}\n\n{command.help}\n"
    if arguments or options:
        yield "\n| | default | |\n|---|---|---|\n"
        yield from (_row(item.name.upper(), item) for item in arguments)
        yield from (_row(" ".join(item.opts), item) for item in options)


def _row(name: str, item: Any) -> str:
    shown = f"{item.default:g}" if isinstance(item.default, float) else item.default
    default = "" if item.default in (None, False) else f"`{shown}`"
    variable = f" Environment: `{item.envvar}`." if item.envvar else ""
    return f"| `{name}` | {default} | {item.help}{variable} |\n"


if __name__ == "__main__":
    PAGE.write_text(commands_page(), encoding="utf-8")
