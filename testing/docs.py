"""Writes docs/commands.md from the command line itself, and the sizes in docs/models.md: `make docs`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from mdi.checkpoint.published import PUBLISHED
from mdi.cli.app import app
from mdi.core.quantization import INT4, INT8, UNQUANTIZED, ModelQuantization
from mdi.models.config import StageSpec
from mdi.models.registry import read_config
from mdi.planning.predict import stage_summary

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "commands.md"
MODELS = DOCS / "models.md"
SIZES, SIZES_END = "<!-- sizes: written by `make docs` -->\n", "<!-- end of sizes -->\n"
CACHED_TOKENS = 8192
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


def models_page() -> str:
    """docs/models.md with its table of sizes as it should be."""
    before, _, rest = MODELS.read_text(encoding="utf-8").partition(SIZES)
    _, _, after = rest.partition(SIZES_END)
    head = (
        f"| shape | parameters | bfloat16 | int8 | int4 | {CACHED_TOKENS:,} tokens of KV cache |\n"
        "|---|---|---|---|---|---|\n"
    )
    return before + SIZES + head + "".join(map(_sizes_row, PUBLISHED)) + SIZES_END + after


def _sizes_row(name: str) -> str:
    config = read_config(PUBLISHED[name])
    whole = StageSpec.everything(config)
    formats = UNQUANTIZED, *(ModelQuantization(quantized, quantized) for quantized in (INT8.name, INT4.name))
    plain, *others = [stage_summary(config, whole, "bfloat16", CACHED_TOKENS, quantized) for quantized in formats]
    sizes = [plain.size_bytes, *(other.size_bytes for other in others), plain.cache_bytes]
    shown = " | ".join(f"{size / 1e9:.2f} GB" for size in sizes)
    return f"| `{name}` | {plain.parameters / 1e9:.2f} billion | {shown} |\n"


if __name__ == "__main__":
    PAGE.write_text(commands_page(), encoding="utf-8")
    MODELS.write_text(models_page(), encoding="utf-8")
